"""The table of families that are converted: what their `config.json` calls them, and how names and numbers translate.

A family here is one file: `table` (tensors) and `section`, `settings` (config), each the inverse of the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from t5x_like.convert.families import gpt2, llama, qwen2, t5
from t5x_like.convert.mapping import Table
from t5x_like.convert.settings import Settings
from t5x_like.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture: the class of transformers whose files these are.

    section(settings): the fields of our config's section `model` that a config.json gives; the others are those of our
    family of that name. settings(config): the fields of a config.json. table(config): the tensors. The first two raise
    UserError for what the other side cannot say.
    """

    architecture: str
    section: Callable[[Settings], dict[str, Any]]
    settings: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig], Table]


# `model_type` of a config.json, which is also our name of the family.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", gpt2.section, gpt2.settings, gpt2.table),
    "llama": Family("LlamaForCausalLM", llama.section, llama.settings, llama.table),
    "qwen2": Family("Qwen2ForCausalLM", qwen2.section, qwen2.settings, qwen2.table),
    "t5": Family("T5ForConditionalGeneration", t5.section, t5.settings, t5.table),
}
