"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values (arXiv 2407.10671).

Numbers only. Sizes are those of Qwen2; `tiny` is ours. The small ones share embedding and LM head.
"""

from collections.abc import Mapping
from typing import Any

from t5x_like.models.families import llama
from t5x_like.models.families.plain import merged

FAMILY: Mapping[str, Any] = merged(
    llama.FAMILY, {"decoder": {"norm_epsilon": 1e-6, "qkv_bias": True, "rope": {"theta": (1e6,)}}}
)


def _size(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    tied: bool,
    vocab: int = 151_936,
    length: int = 131_072,
) -> Mapping[str, Any]:
    stack = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_size": width // heads, "mlp": mlp}
    return {"width": width, "vocab_size": vocab, "max_length": length, "decoder": stack, "head": {"tied": tied}}


SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _size(4, 128, 4, 2, 352, tied=True, vocab=512, length=256),
    "0_5b": _size(24, 896, 14, 2, 4864, tied=True),
    "1_5b": _size(28, 1536, 12, 2, 8960, tied=True),
    "7b": _size(28, 3584, 28, 4, 18_944, tied=False, vocab=152_064),
}
