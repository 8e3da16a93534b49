"""A JAX training system that takes a language model through its whole life cycle on one sharded mesh.

    import t5x_like
    lm = t5x_like.load("runs/tiny")
    print(lm.generate("To be, or", max_new_tokens=40, temperature=0.8))

Names are imported when they are first used, so that `import t5x_like` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5x_like.language_model import LanguageModel, load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("t5x_like.language_model"), name)
    raise AttributeError(f"module 't5x_like' has no attribute {name!r}")
