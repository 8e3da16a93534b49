"""One stack of layers with what belongs to it: position biases, the layers, the final norm; caches of its own tokens.

Decoder, encoder and encoder-decoder are made of it. NOT here: embedding and head (ends.py), one layer
(layers/block.py), how layers are repeated (layers/stack.py).

Legend: B batch, T length, S keys, D model, L layers, N heads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import Tree
from t5x_like.layers import stack
from t5x_like.layers.attention import kv_cache
from t5x_like.layers.attention.biases import Alibi, Bias, Buckets, slopes
from t5x_like.layers.attention.branches import Branches
from t5x_like.layers.block import Block, BlockPlace, Memory, Rows, Shared
from t5x_like.layers.initialization import Initialization
from t5x_like.layers.norms import NORMS
from t5x_like.layers.param import declare, fold, param, stacked
from t5x_like.layers.positions import rope_table
from t5x_like.models.config import ModelConfig, StackConfig
from t5x_like.parallel.pipeline import PipelineConfig, schedule_here
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
    seen by all of its segment. memory: what cross attention reads. branches: how rows branch, None where they do not.
    """

    length: int
    positions_BT: Int[Array, "B T"] | None
    segments_BT: Int[Array, "B T"] | None
    prefix_BT: Int[Array, "B T"] | None = None
    memory: Memory | None = None
    branches: Branches | None = None


@dataclasses.dataclass(frozen=True)
class Tower:
    """A stack as functions of its part of the tree of parameters."""

    model: ModelConfig
    stack: StackConfig
    dtypes: DtypePolicy
    pipeline: PipelineConfig | None
    _: dataclasses.KW_ONLY
    causal: bool
    cross: bool

    @functools.cached_property
    def _ends(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        return declare(lambda: TowerModules(self.stack, self.model.width, self._init), dtype=self.dtypes.params)

    @functools.cached_property
    def _layer(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        place = BlockPlace(
            width=self.model.width,
            dropout=self.model.dropout,
            init=self._init,
            causal=self.causal,
            cross=self.cross,
            attention_block=self.model.attention_block,
        )
        return declare(lambda: Block(self.stack, place), dtype=self.dtypes.params)

    @property
    def _init(self) -> Initialization:
        return Initialization(self.model.init, layers=self.stack.layers)

    def specs(self) -> dict[str, Any]:
        """`layers`, and where the stack has them `relative_bias` and `final_norm`."""
        return {**self._ends[1], "layers": stacked(self._layer[1], self.stack.layers)}

    def run(
        self,
        params: Tree,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        *,
        cache: dict[str, Any] | None,
        fresh_rows_R: Int[Array, " R"] | None = None,
        key: jax.Array | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any] | None, dict[str, Array]]:
        """(hidden states after the final norm, the cache with this call's tokens, the layers' sums in their order).

        fresh_rows_R: the rows of the cache that the batch begins anew, without reading what is in them; None: the batch
        goes on in all of its rows. key: dropout.
        """
        fresh = fresh_rows_R is not None
        reads = cache is not None and not fresh
        schedule = None if cache is not None else schedule_here(self.pipeline)
        with jax.named_scope("layers"):
            ropes = self._ropes(tokens)
        rows = Rows(
            ropes=ropes,
            segments_BT=tokens.segments_BT,
            prefix_BT=None if tokens.prefix_BT is None else tokens.prefix_BT > 0,
            positions_BT=_slot_positions(tokens, len(x_BTD), fresh=fresh) if reads else None,
            memory=tokens.memory,
            branches=tokens.branches,
            numbers_B=None if schedule is None or key is None else jnp.arange(len(x_BTD), dtype=jnp.uint32),
        )
        # A module for the span of one call: its parameters are the arrays at hand.
        ends: Any = nnx.merge(self._ends[0], {name: params[name] for name in self._ends[1]})
        shared = Shared(bias=self._bias(ends), key=None if key is None else fold(key, "layers"))

        def block(weights, x_BTD, rows, *, kind, index, cache):
            return nnx.merge(self._layer[0], weights)(x_BTD, rows, shared, kind=kind, index=index, cache=cache)

        with jax.named_scope("layers"):
            x_BTD, outputs = stack.run(
                {"layers": block},
                {"layers": params["layers"]},
                x_BTD,
                rows,
                kinds=self.stack.kinds,
                cache=_readable(cache, fresh_rows_R),
                scan=self.model.scan,
                remat=self.model.remat,
                pipeline=schedule,
            )
        if self.stack.final_norm:
            with jax.named_scope("final_norm"):
                x_BTD = constrain(ends.final_norm(x_BTD), "batch", "length", "act_embed")
        if cache is not None:
            rows_R = jnp.arange(len(x_BTD)) if fresh_rows_R is None else fresh_rows_R
            positions_BT = _after(x_BTD, _slot_positions(tokens, len(x_BTD), fresh=fresh))
            written = cache["self"].write(*outputs["cache"], positions_BT, rows_R, fresh=fresh)
            cache = {**cache, "self": written}
        return x_BTD, cache, outputs["sums"]

    def cache_specs(self, rows: int, length: int) -> dict[str, Any]:
        """{"self": the slots of self-attention}, of specs."""
        slots = kv_cache.slots_specs(
            [kind.window for kind in self.stack.kinds],
            rows=rows,
            length=length,
            kv_heads=self.stack.kv_heads,
            head_size=self.stack.head_size,
            dtype=self.dtypes.compute,
            stacked=self.model.scan,
        )
        return {"self": slots}

    def cross_specs(self, rows: int, length: int) -> dict[str, Any]:
        """{"cross": the encoder's keys and values for each layer}, of specs."""
        cross = kv_cache.cross_specs(
            layers=self.stack.layers,
            rows=rows,
            length=length,
            kv_heads=self.stack.kv_heads,
            head_size=self.stack.head_size,
            dtype=self.dtypes.compute,
        )
        return {"cross": cross}

    def cross_cache(self, params: Tree, memory: Memory) -> dict[str, Any]:
        """{"cross": keys and values of the encoder's output}, computed once for all layers."""

        def of_layer(weights: Tree) -> tuple[Array, Array]:
            k_BSKH, v_BSKH = nnx.merge(self._layer[0], weights).cross.remember(memory.hidden_BSD)
            return k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)

        k_LBKSH, v_LBKSH = stack.over_layers(of_layer, params["layers"])
        segments_BS = memory.segments_BS
        if segments_BS is None:
            segments_BS = jnp.ones(memory.hidden_BSD.shape[:2], jnp.int32)
        return {"cross": kv_cache.Cross(k=k_LBKSH, v=v_LBKSH, segments=segments_BS)}

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
            return Alibi(jnp.asarray(slopes(stack.heads), jnp.float32))
        return None

    def _ropes(self, tokens: Tokens) -> dict[float, tuple[jax.Array, jax.Array]]:
        """The angles of each theta that some layer has."""
        positions_BT = tokens.positions_BT
        if positions_BT is None:
            positions_BT = jnp.arange(tokens.length, dtype=jnp.int32)[None, :]
        thetas = sorted({kind.rope_theta for kind in self.stack.kinds} - {0.0})
        scaling = self.stack.rope.scaling.chosen
        return {t: rope_table(positions_BT, self.stack.head_size, theta=t, scaling=scaling) for t in thetas}


def _readable(cache: dict[str, Any] | None, fresh_rows_R: Array | None) -> dict[str, Any] | None:
    """What the layers attend through: rows that begin anew read no earlier tokens, and their own sources."""
    if cache is None or fresh_rows_R is None:
        return cache
    read = {**cache, "self": kv_cache.Fresh()}
    return read | {"cross": cache["cross"].of_rows(fresh_rows_R)} if "cross" in cache else read


def _slot_positions(tokens: Tokens, rows: int, *, fresh: bool) -> Int[Array, "B T"]:
    """What the cache's slots will say of each token: its position, or EMPTY for padding."""
    if fresh:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens.length, dtype=jnp.int32), (rows, tokens.length))
    elif tokens.positions_BT is not None:
        positions_BT = tokens.positions_BT
    else:
        raise ValueError("with a cache the batch needs 'positions': where in its row each token stands")
    if tokens.segments_BT is None:
        return positions_BT
    return jnp.where(tokens.segments_BT == 0, kv_cache.EMPTY, positions_BT)


def _after(x_BTD: Array, positions_BT: Array) -> Array:
    """The positions, as numbers that cannot be known before x is.

    A write that might come before the last layer has read makes XLA's CPU compiler copy the cache, twice; a barrier is
    dropped before copies are decided. No position is below EMPTY, which the compiler does not know.
    """
    return jnp.where(jnp.isnan(x_BTD[:, :, 0]) & (positions_BT < kv_cache.EMPTY), kv_cache.EMPTY, positions_BT)
