"""The model as the rest of the program sees it: functions over a plain nested dict of parameters.

A `Model` is a frozen value (config, rules, number formats) that holds no array. It is NOT a module: nothing above this
file knows NNX. `apply` runs under jit.

Legend: B batch, T length, D model, V vocab (padded).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from t5x_like.core import tree
from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.errors import UserError
from t5x_like.core.types import Tree
from t5x_like.layers import kv_cache
from t5x_like.layers.param import initialize
from t5x_like.layers.platform import float32_products
from t5x_like.layers.token_log_probs import Head
from t5x_like.models import decoder, flops
from t5x_like.models.config import ModelConfig
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import use_rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """hidden_BTD: after the final norm, in the compute type. cache: with this call's tokens, or None. sums: what
    objectives need besides (a balance term of experts), by name."""

    hidden_BTD: Float[Array, "B T D"]
    cache: dict[str, Any] | None
    sums: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Model:
    config: ModelConfig
    rules: Rules
    dtypes: DtypePolicy

    @functools.cached_property
    def _parts(self) -> decoder.Declared:
        return decoder.declared(self.config, dtype=self.dtypes.params)

    @functools.cached_property
    def _specs(self) -> dict[str, Any]:
        return decoder.specs(self.config, self._parts)

    def specs(self) -> dict[str, Any]:
        """The nested dict of ParamSpec; nothing is allocated."""
        return self._specs

    def init(self, key: jax.Array) -> dict[str, Any]:
        """First parameters. Pure: jitted with `out_shardings` it draws each shard in place, with the same values."""
        return initialize(self._specs, key)

    def apply(
        self,
        params: Tree,
        batch: Mapping[str, Array],
        *,
        cache: dict[str, Any] | None = None,
        key: jax.Array | None = None,
    ) -> Output:
        """Hidden states of a batch: `inputs` [B, T] and, where given, `positions` and `segment_ids` (0 is padding).

        Absent positions are 0..T-1, absent segments are one. With a cache, which needs positions, the tokens also see
        those of earlier calls. key: dropout; None turns it off.
        """
        _check_tree(params, self._specs)
        length = batch["inputs"].shape[1]
        if length > self.config.max_length:
            raise UserError(
                f"a row of {length} tokens is longer than config.model.max_length={self.config.max_length}; "
                "shorten config.data.length or the text"
            )
        with use_rules(self.rules), float32_products(self.dtypes.compute):
            hidden_BTD, cache = decoder.apply(
                self.config, self._parts, params, batch, dtype=self.dtypes.compute, cache=cache, key=key
            )
        return Output(hidden_BTD, cache, sums={})

    def head(self, params: Tree) -> Head:
        """What scoring multiplies hidden states with: the embedding itself when tied."""
        weight = params["embed"]["tokens"] if self.config.tie_embeddings else params["head"]["weight"]
        return Head(
            weight=weight,
            bias=None,
            vocab_size=self.config.vocab_size,
            softcap=self.config.final_softcap or None,
            rules=self.rules,
        )

    def cache_specs(self, rows: int, length: int) -> dict[str, Any]:
        """The specs of a cache for `rows` texts of up to `length` tokens, prompt included."""
        entries = decoder.cache_entries(self.config, length=length)
        c = self.config
        return kv_cache.specs(entries, rows=rows, kv_heads=c.kv_heads, head=c.head, dtype=self.dtypes.compute)

    def init_cache(self, rows: int, length: int) -> dict[str, Any]:
        """An empty cache."""
        return initialize(self.cache_specs(rows, length), jax.random.key(0))

    def parameter_count(self) -> int:
        """Numbers that are learned: what only pads the vocabulary is left out."""
        return sum(
            math.prod(
                self.config.vocab_size if axis == "vocab" else dim
                for axis, dim in zip(spec.axes, spec.shape, strict=True)
            )
            for _, spec in tree.leaves(self._specs)
        )

    def flops_per_token(self, length: int) -> flops.FlopsPerToken:
        """Floating-point operations per token in rows of `length`; the convention is written there."""
        return flops.per_token(self.config, length=length)


def _check_tree(params: Tree, specs: Tree) -> None:
    """`nnx.merge` matches leaves by sorted position, not by name, and takes any shape; so both are compared here."""
    found, expected = tree.flatten(params), tree.flatten(specs)
    for path in expected.keys() - found.keys():
        raise ValueError(f"parameter {path!r} is missing; the tree holds {sorted(found.keys() - expected.keys())[:5]}")
    for path in found.keys() - expected.keys():
        raise ValueError(f"parameter {path!r} is unknown to this model")
    for path, spec in expected.items():
        if tuple(found[path].shape) != spec.shape:
            raise ValueError(f"parameter {path!r} has shape {tuple(found[path].shape)}; expected {spec.shape}")
