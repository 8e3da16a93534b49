"""What most families share, so that each file of a family says only what is its own. Not a family.

`DECODER` and `ENCODER` are stacks, `MODEL` is what stands around them; `merged` puts a family's own numbers over them.
"""

from collections.abc import Mapping
from typing import Any

_STACK: Mapping[str, Any] = {
    "norm_order": "pre",
    "parallel": False,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "attention_scale": 0.0,  # head_size ** -0.5
    "attention_softcap": 0.0,
    "windows": (0,),
    "final_norm": True,
    # Read only where `position` names them.
    "rope": {
        "theta": (10_000.0,),
        "scaling": {
            "name": "none",
            "linear": {"factor": 1.0},
            "llama3": {"factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_length": 8192},
            "yarn": {
                "factor": 1.0,
                "original_length": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.0,
            },
        },
    },
    "relative": {"buckets": 32, "max_distance": 128},
}
DECODER = ENCODER = _STACK
MODEL: Mapping[str, Any] = {
    "architecture": "decoder",
    "embedding": {"scale": 1.0, "norm": False, "types": 0, "offset": 0},
    "head": {"tied": False, "scale": 1.0, "bias": False, "softcap": 0.0, "transform": False},
    "scalar_heads": (),
    "init": {"name": "normal", "std": 0.02, "depth_scaled": False},
}


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections of both; `second` wins.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a': {'b': 3, 'c': 2}}
    """
    result = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
