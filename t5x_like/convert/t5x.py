"""Checkpoints of T5X (github.com/google-research/t5x) before Orbax: msgpack, with large arrays as zarr beside it.

The msgpack, which flax wrote, holds small arrays itself (extension 1: shape, dtype, bytes) and names the others. Only
layers by number (`layers_0`) are read, not the scanned form. Matrices are stored [in, out].

What the file does not say is T5's usual: 1.1 (gated) has the tanh GELU, 1.0 ReLU; the last bucket begins at 128 tokens.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts

from t5x_like.convert.layout import Span
from t5x_like.convert.mapping import Row, Table
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig
from t5x_like.storage import paths

FILE = "checkpoint"
_PLACEHOLDER = "PLACEHOLDER://"
_ARRAY = 1  # flax's extension type of an array
_NAMES = {
    "encoder": ("encoder_norm", {"attention": ("attention", "pre_attention_layer_norm")}),
    "decoder": (
        "decoder_norm",
        {
            "attention": ("self_attention", "pre_self_attention_layer_norm"),
            "cross": ("encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        },
    ),
}
_MATRICES = {"q": "query", "k": "key", "v": "value"}


def table(config: ModelConfig) -> Table:
    rows = [Row("token_embedder/embedding", "embed/tokens")]
    for stack, (norm, branches) in _NAMES.items():
        layer = f"{stack}/layers_{{layer}}"
        for ours, (theirs, before) in branches.items():
            path = f"{stack}/layers/{ours}"
            rows += [Row(f"{layer}/{before}/scale", f"{path}_norm/scale")]
            rows += [
                Row(f"{layer}/{theirs}/{name}/kernel", f"{path}/{part}", "D (N H) -> D N H")
                for part, name in _MATRICES.items()
            ]
            rows += [Row(f"{layer}/{theirs}/out/kernel", f"{path}/o", "(N H) D -> N H D")]
        inner = {"wi_0": "gate", "wi_1": "up"} if config.stacks[stack].gated else {"wi": "up"}
        rows += [Row(f"{layer}/pre_mlp_layer_norm/scale", f"{stack}/layers/mlp_norm/scale")]
        rows += [Row(f"{layer}/mlp/{name}/kernel", f"{stack}/layers/mlp/{part}") for name, part in inner.items()]
        rows += [Row(f"{layer}/mlp/wo/kernel", f"{stack}/layers/mlp/down")]
        rows += [Row(f"{stack}/relpos_bias/rel_embedding", f"{stack}/relative_bias/table", "N B -> B N")]
        rows += [Row(f"{stack}/{norm}/scale", f"{stack}/final_norm/scale")]
    if not config.head.tied:
        rows += [Row("decoder/logits_dense/kernel", "head/weight", "D V -> V D")]
    return Table(rows)


class Tensors:
    """Arrays in memory and zarr arrays by name (mapping.Source)."""

    def __init__(self, where: str, arrays: Mapping[str, Any]):
        self.where, self._arrays = where, arrays

    def described(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {
            name: (tuple(array.shape), array.dtype if isinstance(array, np.ndarray) else array.dtype.numpy_dtype)
            for name, array in self._arrays.items()
        }

    def read(self, name: str, span: Span, *, reuse: bool = False) -> np.ndarray:
        del reuse
        array = self._arrays[name]
        if isinstance(array, ts.TensorStore):
            array = self._whole(name, array)
        return np.ascontiguousarray(array.reshape(span.sizes)[tuple(slice(*each) for each in span.box)])

    def _whole(self, name: str, array: ts.TensorStore) -> np.ndarray:
        """T5X cut its arrays to fit a host. A chunk that is not there is zeros, as zarr leaves such chunks out."""
        try:
            return array.read().result()
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).partition("[source locations=")[0].split())[:200]
            raise UserError(f"{self.where}: {name!r} cannot be read ({reason}); copy it again") from None


def is_checkpoint(path: str) -> bool:
    """Whether a file is such a msgpack, or a folder holds one: it begins with a map that has a short text as key."""
    place = os.path.join(path, FILE) if os.path.isdir(path) else path
    if not os.path.isfile(place):
        return False
    with open(place, "rb") as file:
        head = file.read(16)
    return len(head) > 2 and 0x81 <= head[0] <= 0x8F and head[2:].startswith((b"version", b"optimizer"[:7]))


def read(path: str) -> tuple[dict[str, Any], Tensors]:
    """(fields of our model's section, the tensors). The msgpack file is held whole, without the optimizer's arrays."""
    folder, place = (path, os.path.join(path, FILE)) if os.path.isdir(path) else (os.path.dirname(path), path)
    content = paths.read_bytes(place)
    try:
        unpacked = msgpack.unpackb(content, ext_hook=_extension, raw=False, strict_map_key=False)
        target = unpacked["optimizer"]["target"]
        arrays = dict(_arrays(target, "", folder))
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{place} is no whole T5X checkpoint ({type(error).__name__}: {reason}); copy it again"
        ) from None
    return _section(arrays, place), Tensors(place, arrays)


def _extension(code: int, data: bytes) -> Any:
    """An array of flax, as a view of its bytes."""
    if code != _ARRAY:
        return None
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    return np.frombuffer(content, np.dtype(dtype)).reshape(shape)


def _arrays(node: Mapping[str, Any], prefix: str, folder: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, np.ndarray):
            yield name, value
        elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
            yield name, _zarr(folder, value.removeprefix(_PLACEHOLDER))
        elif isinstance(value, Mapping) and "kvstore" in value:
            yield name, _zarr(folder, str(value["kvstore"].get("path", "")).rstrip("/"))
        elif isinstance(value, Mapping):
            yield from _arrays(value, f"{name}/", folder)
        else:
            raise ValueError(f"{name} is a {type(value).__name__}")


def _zarr(folder: str, name: str) -> ts.TensorStore:
    if not name or os.path.basename(name) != name or name in (".", ".."):
        raise UserError(f"{folder}: {name!r} is no name of an array in this folder")
    place = os.path.join(folder, name)
    try:
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{place}/"}}
        return ts.open(spec, open=True, read=True).result()
    except (ValueError, OSError):
        raise UserError(f"{place} is no zarr array; the checkpoint is not whole") from None


def _section(arrays: Mapping[str, Any], where: str) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise UserError(f"{where}: {name!r} is missing; expected the unscanned encoder and decoder of a T5")
        found = tuple(arrays[name].shape)
        if len(found) != 2 or not all(found):
            raise UserError(f"{where}: {name!r} has the shape {list(found)}, expected a matrix")
        return found

    vocab, width = shape("token_embedder/embedding")
    stacks = {}
    for stack, (_, branches) in _NAMES.items():
        heads, buckets = shape(f"{stack}/relpos_bias/rel_embedding")
        inner = shape(f"{stack}/layers_0/{branches['attention'][0]}/query/kernel")[1]
        gated = f"{stack}/layers_0/mlp/wi_0/kernel" in arrays
        layers = {name.split("/")[1] for name in arrays if name.startswith(f"{stack}/layers_")}
        stacks[stack] = {
            "layers": len(layers),
            "heads": heads,
            "kv_heads": heads,
            "head_size": inner // heads,
            "mlp": shape(f"{stack}/layers_0/mlp/{'wi_0' if gated else 'wi'}/kernel")[1],
            "gated": gated,
            "activation": "gelu_tanh" if gated else "relu",
            "relative": {"buckets": buckets, "max_distance": 128},
        }
    tied = "decoder/logits_dense/kernel" not in arrays
    return {
        "vocab_size": vocab,
        "max_length": 512,
        "width": width,
        **stacks,
        "head": {"tied": tied, "scale": 0.0 if tied else 1.0},
    }
