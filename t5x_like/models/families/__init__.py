"""The table of model families: what the sizes of each have in common, and the sizes, both as fields of ModelConfig.

Not here: how a family computes (layers/, one_stack.py, encoder_decoder.py) and how its files are read (convert/).
"""

from collections.abc import Mapping
from typing import Any

from t5x_like.models.families import gpt2, llama, qwen2, t5

Fields = Mapping[str, Any]  # fields of ModelConfig; a nested section is a nested mapping

# family -> (fields of the whole family, {size: further fields})
FAMILIES: dict[str, tuple[Fields, Mapping[str, Fields]]] = {
    "gpt2": (gpt2.FAMILY, gpt2.SIZES),
    "llama": (llama.FAMILY, llama.SIZES),
    "qwen2": (qwen2.FAMILY, qwen2.SIZES),
    "t5": (t5.FAMILY, t5.SIZES),
}
