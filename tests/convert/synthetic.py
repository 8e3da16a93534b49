"""A large random Llama in a folder, written in small pieces, and a conversion that reports its peak of memory.

python synthetic.py FUNCTION SRC DST      in a process of its own: prints {"before", "peak", "seconds"}, bytes
"""

import json
import pathlib
import re
import resource
import sys
import time

import ml_dtypes
import numpy as np

from t5x_like.convert.layout import Span
from t5x_like.convert.safetensors import Writer

_WIDTH, _MLP, _VOCAB = 2048, 5632, 32_000


def write(folder: pathlib.Path, *, size: int, dtype: str) -> int:
    """Writes a model of about `size` bytes; returns how many layers it has."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    layer = 2 * _WIDTH * _WIDTH + 2 * _WIDTH * 512 + 3 * _WIDTH * _MLP
    layers = max(1, round((size / kind.itemsize - 2 * _VOCAB * _WIDTH) / layer))
    tensors = {"model.embed_tokens.weight": (_VOCAB, _WIDTH), "lm_head.weight": (_VOCAB, _WIDTH)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (_WIDTH,),
            f"{prefix}post_attention_layernorm.weight": (_WIDTH,),
            f"{prefix}self_attn.q_proj.weight": (_WIDTH, _WIDTH),
            f"{prefix}self_attn.k_proj.weight": (512, _WIDTH),
            f"{prefix}self_attn.v_proj.weight": (512, _WIDTH),
            f"{prefix}self_attn.o_proj.weight": (_WIDTH, _WIDTH),
            f"{prefix}mlp.gate_proj.weight": (_MLP, _WIDTH),
            f"{prefix}mlp.up_proj.weight": (_MLP, _WIDTH),
            f"{prefix}mlp.down_proj.weight": (_WIDTH, _MLP),
        }
    tensors["model.norm.weight"] = (_WIDTH,)
    folder.mkdir()
    writer = Writer(str(folder / "model.safetensors"), {name: (shape, kind) for name, shape in tensors.items()})
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32).astype(kind)
    for number, (name, shape) in enumerate(tensors.items()):
        rows = max(1, (1 << 20) // int(np.prod(shape[1:])))
        for begin in range(0, shape[0], rows):
            box = ((begin, min(begin + rows, shape[0])), *((0, each) for each in shape[1:]))
            span = Span(shape, box)
            writer.write(name, span, np.roll(noise, number + begin)[: int(np.prod(span.shape))])
    writer.close()
    config = {
        "model_type": "llama",
        "vocab_size": _VOCAB,
        "hidden_size": _WIDTH,
        "intermediate_size": _MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def peak_bytes() -> int:
    """The peak of this program alone: `ru_maxrss` begins with that of the process which started it, pytest."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    from t5x_like.convert import convert

    name, source, target = sys.argv[1:]
    before, start = peak_bytes(), time.perf_counter()
    if name == "export":
        from t5x_like.compress import choice, quant_array
        from t5x_like.convert import export

        int8 = export.Int8(choice.dims, quant_array.quantized)
        export.export(source, target, form="compressed-tensors", int8=int8)
    else:
        getattr(convert, name)(source, target)
    seconds = time.perf_counter() - start
    print(json.dumps({"before": before, "peak": peak_bytes(), "seconds": seconds}))
