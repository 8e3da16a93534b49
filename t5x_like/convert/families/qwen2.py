"""Qwen2 and Qwen2.5: `config.json` and tensors of transformers' Qwen2ForCausalLM, and ours.

As Llama, with biases that its config does not say: queries, keys and values have them. Windows of some of the layers
(`use_sliding_window`), which no published model turns on, are refused.
"""

from typing import Any

from t5x_like.convert.families import llama
from t5x_like.convert.settings import Settings, require_usual
from t5x_like.models.config import ModelConfig

table = llama.table


def section(s: Settings) -> dict[str, Any]:
    s.require(use_sliding_window=False)
    return llama.sizes(s)


def settings(config: ModelConfig) -> dict[str, Any]:
    free = ("norm_epsilon", "activation", "rope")
    require_usual(config, free=("head.tied", "init", "scalar_heads", *(f"decoder.{name}" for name in free)))
    return llama.size_settings(config) | {"use_sliding_window": False, "sliding_window": None}
