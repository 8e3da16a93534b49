"""GPT-2: layer norm, learned positions, plain GELU (tanh form), biases everywhere, tied head (Radford et al. 2019).

Numbers only. Sizes are the published ones; `tiny` is ours.
"""

from collections.abc import Mapping
from typing import Any

FAMILY: Mapping[str, Any] = {
    "norm": "layer",
    "norm_epsilon": 1e-5,
    "position": "learned",
    "activation": "gelu_tanh",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
    "attention_softcap": 0.0,
    "final_softcap": 0.0,
    "windows": (0,),
    "rope": {  # position is "learned": none of these is used
        "theta": (10_000.0,),
        "scaling": {
            "name": "none",
            "factor": 1.0,
            "low_frequency": 1.0,
            "high_frequency": 4.0,
            "original_length": 1024,
        },
    },
    "tie_embeddings": True,
    "init_deviation": 0.02,
    "depth_scaled_init": True,
}


def _size(layers: int, embed: int, heads: int, *, vocab: int = 50_257, length: int = 1024) -> Mapping[str, Any]:
    return {
        "layers": layers,
        "embed": embed,
        "heads": heads,
        "kv_heads": heads,
        "head": embed // heads,
        "mlp": 4 * embed,
        "vocab_size": vocab,
        "max_length": length,
    }


SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _size(4, 128, 4, vocab=512, length=256),
    "small": _size(12, 768, 12),
    "medium": _size(24, 1024, 16),
    "large": _size(36, 1280, 20),
    "xl": _size(48, 1600, 25),
}
