"""GPT-2: layer norm, learned positions, plain GELU (tanh form), biases everywhere, tied head (Radford et al. 2019).

Numbers only. Sizes are the published ones; `tiny` is ours.
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
                "norm": "layer",
                "norm_epsilon": 1e-5,
                "position": "learned",
                "activation": "gelu_tanh",
                "gated": False,
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
            },
        ),
        "head": {"tied": True},
        "init": {"depth_scaled": True},
    },
)


def _size(layers: int, width: int, heads: int, *, vocab: int = 50_257, length: int = 1024) -> Mapping[str, Any]:
    return {
        "width": width,
        "vocab_size": vocab,
        "max_length": length,
        "decoder": {
            "layers": layers,
            "heads": heads,
            "kv_heads": heads,
            "head_size": width // heads,
            "mlp": 4 * width,
        },
    }


SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _size(4, 128, 4, vocab=512, length=256),
    "small": _size(12, 768, 12),
    "medium": _size(24, 1024, 16),
    "large": _size(36, 1280, 20),
    "xl": _size(48, 1600, 25),
}
