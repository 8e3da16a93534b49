"""T5: encoder-decoder, RMS norm, relative position buckets, unscaled logits, no biases (arXiv 1910.10683).

Numbers only. Plain names are T5 1.0 (ReLU, tied head scaled by width ** -0.5); `1_1_` is T5 1.1 (gated GELU, untied
head), which FLAN-T5 shares; `mt5_` is the multilingual one (arXiv 2010.11934). Published vocabularies are padded
already. `tiny` and `mini` are ours, for laptops.
"""

from collections.abc import Mapping
from typing import Any

from t5x_like.models.families.plain import DECODER, ENCODER, MODEL, merged

_LAYER: Mapping[str, Any] = {
    "norm": "rms",
    "norm_epsilon": 1e-6,
    "position": "relative",
    "activation": "relu",
    "gated": False,
    "attention_scale": 1.0,
}
FAMILY: Mapping[str, Any] = merged(
    MODEL,
    {
        "architecture": "encoder_decoder",
        "encoder": merged(ENCODER, _LAYER),
        "decoder": merged(DECODER, _LAYER),
        "head": {"tied": True, "scale": 0.0},  # width ** -0.5
        "init": {"name": "fan_in", "std": 1.0},
    },
)


def _size(
    layers: int, width: int, heads: int, head_size: int, mlp: int, *, vocab: int = 32_128, length: int = 512
) -> Mapping[str, Any]:
    stack = {"layers": layers, "heads": heads, "kv_heads": heads, "head_size": head_size, "mlp": mlp}
    return {"width": width, "vocab_size": vocab, "max_length": length, "encoder": stack, "decoder": stack}


def _gated(size: Mapping[str, Any]) -> Mapping[str, Any]:
    """The changes from 1.0 to 1.1."""
    gated = {"activation": "gelu_tanh", "gated": True}
    return merged(size, {"encoder": gated, "decoder": gated, "head": {"tied": False, "scale": 1.0}})


_GATED: Mapping[str, Mapping[str, Any]] = {
    "small": _size(8, 512, 6, 64, 1024),
    "base": _size(12, 768, 12, 64, 2048),
    "large": _size(24, 1024, 16, 64, 2816),
    "xl": _size(24, 2048, 32, 64, 5120),
    "xxl": _size(24, 4096, 64, 64, 10_240),
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _gated(_size(3, 128, 4, 32, 256, vocab=640, length=256)),
    "mini": _gated(_size(4, 512, 8, 64, 1024, vocab=8192)),
    "small": _size(6, 512, 8, 64, 2048),
    "base": _size(12, 768, 12, 64, 3072),
    "large": _size(24, 1024, 16, 64, 4096),
    "3b": _size(24, 1024, 32, 128, 16_384),
    "11b": _size(24, 1024, 128, 128, 65_536),
    **{f"1_1_{name}": _gated(size) for name, size in _GATED.items()},
    **{f"mt5_{name}": _gated(merged(size, {"vocab_size": 250_112})) for name, size in _GATED.items()},
}
