"""Llama: RMS norm, rotary positions, grouped-query attention, gated SiLU, no biases (arXiv 2302.13971, 2407.21783).

Numbers only. "8b" and "70b" are Llama 3, a leading number is another version; `tiny` to `mini` are ours, for laptops.
"""

from collections.abc import Mapping
from typing import Any

from t5x_like.models.families.plain import DECODER, MODEL, merged

FAMILY: Mapping[str, Any] = merged(
    MODEL,
    {
        "decoder": merged(
            DECODER,
            {
                "norm": "rms",
                "norm_epsilon": 1e-5,
                "position": "rope",
                "activation": "silu",
                "gated": True,
            },
        ),
    },
)


def _size(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    vocab: int,
    length: int,
    theta: float,
    tied: bool,
    scaling: str = "none",
    factor: float = 8.0,
) -> Mapping[str, Any]:
    return {
        "width": width,
        "vocab_size": vocab,
        "max_length": length,
        "decoder": {
            "layers": layers,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": width // heads,
            "mlp": mlp,
            "rope": {"theta": (theta,), "scaling": {"name": scaling, "llama3": {"factor": factor}}},
        },
        "head": {"tied": tied},
    }


def _llama2(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> Mapping[str, Any]:
    return _size(layers, width, heads, kv_heads, mlp, vocab=32_000, length=4096, theta=10_000.0, tied=False)


def _llama3(layers: int, width: int, heads: int, mlp: int) -> Mapping[str, Any]:
    return _size(layers, width, heads, 8, mlp, vocab=128_256, length=8192, theta=500_000.0, tied=False)


SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _size(4, 128, 4, 4, 352, vocab=512, length=256, theta=10_000.0, tied=True),
    "small": _size(6, 256, 4, 4, 704, vocab=4096, length=512, theta=10_000.0, tied=True),
    "mini": _size(8, 512, 8, 8, 1376, vocab=8192, length=512, theta=10_000.0, tied=False),
    "2_7b": _llama2(32, 4096, 32, 32, 11_008),
    "2_13b": _llama2(40, 5120, 40, 40, 13_824),
    "2_70b": _llama2(80, 8192, 64, 8, 28_672),
    "8b": _llama3(32, 4096, 32, 14_336),
    "70b": _llama3(80, 8192, 64, 28_672),
    "3_1_8b": _size(
        32, 4096, 32, 8, 14_336, vocab=128_256, length=131_072, theta=500_000.0, tied=False, scaling="llama3"
    ),
    "3_1_405b": _size(
        126, 16_384, 128, 8, 53_248, vocab=128_256, length=131_072, theta=500_000.0, tied=False, scaling="llama3"
    ),
    "3_2_1b": _size(
        16, 2048, 32, 8, 8192, vocab=128_256, length=131_072, theta=500_000.0, tied=True, scaling="llama3", factor=32.0
    ),
}
