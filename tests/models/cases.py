"""Tiny models for tests: one table of cases for all families, and the config section that they start from."""

import dataclasses
import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.models.config import STACKS, ModelConfig, resolve
from t5x_like.models.families import FAMILIES
from t5x_like.models.model import Model
from t5x_like.parallel.rules import rules

# Fields of stacks stand beside those of the model: `section` puts them where they belong.
SIZE = {
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 4,
    "head_size": 8,
    "mlp": 48,
    "vocab_size": 61,
    "vocab_multiple": 32,
    "max_length": 64,
    "tied": False,
    "std": 0.2,  # large, so that attention is far from uniform
}
LLAMA3 = {
    "name": "llama3",
    "llama3": {"factor": 8.0, "low_frequency": 1.0, "high_frequency": 4.0, "original_length": 16},
}
LINEAR = {"name": "linear", "linear": {"factor": 4.0}}
YARN = {
    "name": "yarn",
    "yarn": {
        "factor": 4.0,
        "original_length": 16,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "attention_factor": 0.1 * math.log(4.0) + 1.0,
    },
}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama_grouped_tied": {"family": "llama", "kv_heads": 2, "tied": True},
    "llama_scaled_rope": {"family": "llama", "kv_heads": 1, "rope": {"theta": (100.0,), "scaling": LLAMA3}},
    "gpt2": {"family": "gpt2", "tied": True},
    "qwen2": {"family": "qwen2", "kv_heads": 2},
    "local_and_global": {
        "family": "llama",
        "layers": 5,
        "windows": (3, 0),
        "rope": {"theta": (100.0, 10_000.0), "scaling": {"name": "none"}},
        "qk_norm": True,
        "attention_softcap": 5.0,
        "softcap": 3.0,
    },
    "t5": {"family": "t5", "tied": True, "std": 1.0, "relative": {"buckets": 8, "max_distance": 20}},
    "t5_gated": {"family": "t5", "std": 1.0, "activation": "gelu_tanh", "gated": True, "scale": 1.0},
}
# Those that transformers has under the same name of a family.
PUBLISHED = ("llama", "llama_grouped_tied", "llama_scaled_rope", "gpt2", "qwen2", "t5", "t5_gated")


def empty(cls: Any) -> Any:
    """A section with every field of a config class, all None: family and size decide."""
    hints = typing.get_type_hints(cls)
    return {field.name: _empty(hints[field.name]) for field in dataclasses.fields(cls)}


def _empty(hint: Any) -> Any:
    inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
    return None if inner is None else empty(inner)


def section(**fields: Any) -> dict[str, Any]:
    """The section `model` of a config with every field given: None where family and size decide."""
    model = empty(ModelConfig) | {
        "vocab_multiple": 128,
        "dropout": 0.0,
        "scan": True,
        "remat": "none",
        "attention_block": 1024,
        "dtype": {"params": "float32", "compute": "float32", "products": "compute"},
    }  # fmt: skip
    stacks = STACKS[fields.get("architecture") or FAMILIES[fields["family"]][0]["architecture"]]
    for name, value in fields.items():
        holders = [model] if name in model else [model[part] for part in ("head", "init") if name in model[part]]
        for holder in holders or [model[stack] for stack in stacks]:
            assert name in holder, name
            holder[name] = value
    return model


def config(case: str, **fields: Any) -> ModelConfig:
    return resolve(section(size="custom", **(SIZE | CASES[case] | fields)))


def model(case: str, **fields: Any) -> Model:
    return Model(config(case, **fields), rules(), DtypePolicy("float32", "float32"))


def sized(family: str, size: str) -> Model:
    return Model(resolve(section(family=family, size=size)), rules(), DtypePolicy("float32", "float32"))


def random_params(model: Model, seed: int = 0) -> dict[str, Any]:
    """Drawn by numpy, which compiles nothing. Biases and scales too are away from 0 and 1."""
    generator = np.random.default_rng(seed)

    def draw(spec):
        kind, number = spec.init.rstrip(")").split("(")
        noise = generator.standard_normal(spec.shape).astype(np.float32)
        return jnp.asarray(noise * float(number) if kind == "normal" else float(number) + 0.3 * noise)

    return jax.tree.map(draw, model.specs(), is_leaf=lambda leaf: hasattr(leaf, "init"))


def tokens(model: Model, rows: int, length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, length)), jnp.int32)


def batch(model: Model, rows: int, length: int, *, source: int = 10, seed: int = 0) -> dict[str, jax.Array]:
    """Token ids for whatever `apply` of this model reads."""
    arrays = {"inputs": tokens(model, rows, length, seed)}
    if "encoder_inputs" in model.inputs:
        arrays["encoder_inputs"] = tokens(model, rows, source, seed + 100)
    return arrays


def largest_difference(a: Any, b: Any) -> float:
    """max|a - b| / max|b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.abs(b).max() > 0, "both all zero would prove nothing"
    return float(np.abs(a - b).max() / np.abs(b).max())
