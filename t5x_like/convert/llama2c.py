"""Checkpoints of llama2.c (github.com/karpathy/llama2.c, export.py): Llama in one file of plain float32 arrays.

Version 0 begins with seven numbers, version 1 with a magic one; version 2 is quantized and refused. Meta's order of
rotary positions turns neighbouring pairs (2i, 2i+1); ours turns halves (i, i + H/2), so queries and keys are permuted.
"""

import contextlib
import math
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_like.convert.families import llama
from t5x_like.convert.mapping import Row, Table
from t5x_like.convert.safetensors import FileTensors, opened
from t5x_like.convert.settings import Settings
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig

_MAGIC = b"24ka"  # "ak42" as a little-endian number
_HEADER = "<7i"
_VERSION_1_BYTES = 256
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PAIRS = {"half": 2}


def table(config: ModelConfig) -> Table:
    rows = [
        Row("tok_embeddings", "embed/tokens"),
        Row("attention_norm.{layer}", "layers/attention_norm/scale"),
        Row("wq.{layer}", "layers/attention/q", "(N P half) D -> D N (half P)", _PAIRS),
        Row("wk.{layer}", "layers/attention/k", "(K P half) D -> D K (half P)", _PAIRS),
        Row("wv.{layer}", "layers/attention/v", "(K H) D -> D K H"),
        Row("wo.{layer}", "layers/attention/o", "D (N H) -> N H D"),
        Row("ffn_norm.{layer}", "layers/mlp_norm/scale"),
        Row("w1.{layer}", "layers/mlp/gate", "F D -> D F"),
        Row("w2.{layer}", "layers/mlp/down", "D F -> F D"),
        Row("w3.{layer}", "layers/mlp/up", "F D -> D F"),
        Row("norm", "final_norm/scale"),
    ]
    if not config.head.tied:
        rows += [Row("output", "head/weight")]
    return Table(rows, ignored=("freq_cis_real", "freq_cis_imag"))


@contextlib.contextmanager
def open_checkpoint(path: str) -> Iterator[tuple[dict[str, Any], FileTensors]]:
    """(fields of our model's section, the tensors) of a .bin file."""
    with opened(path) as descriptor:
        head, total = os.pread(descriptor, _VERSION_1_BYTES, 0), os.fstat(descriptor).st_size
        if head.startswith(_PICKLES):
            raise UserError(
                f"{path} is a pickled file, which may run code; load it with torch where you trust it, and save it as "
                "safetensors"
            )
        versioned = head[:4] == _MAGIC
        if len(head) < 28 or (
            versioned and (len(head) < _VERSION_1_BYTES or struct.unpack_from("<i", head, 4)[0] != 1)
        ):
            raise UserError(
                f"{path} is no llama2.c checkpoint of version 0 or 1 (2 is quantized: convert its original)"
            )
        numbers = struct.unpack_from(_HEADER, head, 8 if versioned else 0)
        width, mlp, layers, heads, kv_heads, vocab, length = numbers
        tied = bool(head[8 + 28]) if versioned else vocab > 0
        vocab = abs(vocab)
        sound = all(0 < number < 2**24 for number in (width, mlp, layers, heads, kv_heads, vocab, length))
        if not sound or width % heads or (width // heads) % 2 or heads % kv_heads or layers > 4096:
            raise UserError(f"{path} is no llama2.c checkpoint: its first numbers are {list(numbers)}")
        shapes = _shapes(width, mlp, layers, heads, kv_heads, vocab)
        order = (
            _version_1(shapes, layers, tied) if versioned else _version_0(shapes, layers, length, width // heads, tied)
        )
        tensors, offset = {}, _VERSION_1_BYTES if versioned else 28
        for name, shape in order:
            tensors[name] = (shape, np.dtype(np.float32), offset)
            offset += 4 * math.prod(shape)
        if offset != total:
            raise UserError(
                f"{path} has {total:,} bytes, expected {offset:,} by its header; it is damaged or truncated"
            )
        section = _section(path, width, mlp, layers, heads, kv_heads, vocab, length, tied)
        yield section, FileTensors(path, tensors, descriptor)


def _shapes(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, tuple[int, ...]]:
    keys = width // heads * kv_heads
    return {
        "attention_norm": (width,),
        "ffn_norm": (width,),
        "wq": (width, width),
        "wk": (keys, width),
        "wv": (keys, width),
        "wo": (width, width),
        "w1": (mlp, width),
        "w2": (width, mlp),
        "w3": (mlp, width),
        "norm": (width,),
        "tok_embeddings": (vocab, width),
        "output": (vocab, width),
    }


_Order = list[tuple[str, tuple[int, ...]]]


def _version_0(shapes: dict[str, tuple[int, ...]], layers: int, length: int, head: int, tied: bool) -> _Order:
    order: _Order = [("tok_embeddings", shapes["tok_embeddings"])]
    for name in ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"):
        order += [(f"{name}.{layer}", shapes[name]) for layer in range(layers)]
    order += [("norm", shapes["norm"]), ("freq_cis_real", (length, head // 2)), ("freq_cis_imag", (length, head // 2))]
    return order + ([] if tied else [("output", shapes["output"])])


def _version_1(shapes: dict[str, tuple[int, ...]], layers: int, tied: bool) -> _Order:
    order: _Order = []
    for name in ("attention_norm", "ffn_norm", None, "wq", "wk", "wv", "wo", "w1", "w2", "w3"):
        if name is None:
            order += [("norm", shapes["norm"]), ("tok_embeddings", shapes["tok_embeddings"])]
        else:
            order += [(f"{name}.{layer}", shapes[name]) for layer in range(layers)]
    return order + ([] if tied else [("output", shapes["output"])])


def _section(
    path: str, width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int, tied: bool
) -> dict[str, Any]:
    said = {
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": tied,
    }
    return llama.section(Settings(said, path, ()))
