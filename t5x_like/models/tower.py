"""One stack of layers with what belongs to it: position biases, the layers, the final norm; caches of its own tokens.

Decoder, encoder and encoder-decoder are made of it. NOT here: embedding and head (ends.py), one layer (layers/block.py),
how layers are repeated (layers/stack.py).

Legend: B batch, T length, S keys, D model, L layers, N heads.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import Tree
from t5x_like.layers import kv_cache, stack
from t5x_like.layers.biases import Alibi, Bias, Buckets, alibi_slopes
from t5x_like.layers.block import Block, BlockPlace, Memory, Shared
from t5x_like.layers.initialization import Initialization
from t5x_like.layers.norms import NORMS
from t5x_like.layers.param import declare, fold, param, stacked
from t5x_like.layers.positions import rope_table
from t5x_like.models.config import ModelConfig, StackConfig
from t5x_like.parallel.sharding import constrain


class RelativeBias(nnx.Module):
    """T5's table: one number for each bucket of distances and head, shared by all layers of a stack."""

    def __init__(self, stack: StackConfig, width: int, init: Initialization):
        self.table = param((stack.relative.buckets, stack.heads), axes=("buckets", "heads"), init=init.weight(width))


class TowerModules(nnx.Module):
    """What a stack has besides its layers."""

    def __init__(self, stack: StackConfig, width: int, init: Initialization):
        if stack.position == "relative":
            self.relative_bias = RelativeBias(stack, width, init)
        if stack.final_norm:
            self.final_norm = NORMS[stack.norm](width, epsilon=stack.norm_epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one call beside their embeddings.

    positions_BT: None for the index. segments_BT: None for one segment; 0 is padding. prefix_BT: 1 where a token is
    seen by all of its segment. memory: what cross attention reads.
    """

    length: int
    positions_BT: Int[Array, "B T"] | None
    segments_BT: Int[Array, "B T"] | None
    prefix_BT: Int[Array, "B T"] | None = None
    memory: Memory | None = None


@dataclasses.dataclass(frozen=True)
class Tower:
    """A stack as functions of its part of the tree of parameters."""

    model: ModelConfig
    stack: StackConfig
    dtypes: DtypePolicy
    _: dataclasses.KW_ONLY
    causal: bool
    cross: bool

    @functools.cached_property
    def _ends(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        return declare(lambda: TowerModules(self.stack, self.model.width, self._init), dtype=self.dtypes.params)

    @functools.cached_property
    def _layer(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        place = BlockPlace(
            width=self.model.width, dropout=self.model.dropout, init=self._init, causal=self.causal, cross=self.cross
        )
        return declare(lambda: Block(self.stack, place), dtype=self.dtypes.params)

    @property
    def _init(self) -> Initialization:
        return Initialization(self.model.init, layers=self.stack.layers)

    def specs(self) -> dict[str, Any]:
        """`layers`, and where the stack has them `relative_bias` and `final_norm`."""
        return {**self._ends[1], "layers": stacked(self._layer[1], self.stack.layers)}

    def _bias(self, ends: Any) -> Bias | None:
        """What is added to the attention logits of every layer, by position."""
        stack = self.stack
        if stack.position == "relative":
            return Buckets(
                ends.relative_bias.table.get_value(),
                bidirectional=not self.causal,
                max_distance=stack.relative.max_distance,
            )
        if stack.position == "alibi":
            return Alibi(jnp.asarray(alibi_slopes(stack.heads), jnp.float32))
        return None

    def _ropes(self, tokens: Tokens) -> dict[float, tuple[jax.Array, jax.Array]]:
        """The angles of each theta that some layer has."""
        positions_BT = tokens.positions_BT
        if positions_BT is None:
            positions_BT = jnp.arange(tokens.length, dtype=jnp.int32)[None, :]
        thetas = sorted({kind.rope_theta for kind in self.stack.kinds} - {0.0})
        scaling = self.stack.rope.scaling
        return {t: rope_table(positions_BT, self.stack.head_size, theta=t, scaling=scaling) for t in thetas}

