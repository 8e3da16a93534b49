"""A decoder: embedding, a stack of equal-shaped layers, final norm; and the head that scoring multiplies with.

It composes layers/ into functions of a plain tree of parameters. NOT here: the interface that the rest of the program
sees (model.py), logits and losses (layers/token_log_probs.py).

Legend: B batch, R rows of a call, T length, D model, V vocab (padded).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.core.types import Tree
from t5x_like.layers import kv_cache, stack
from t5x_like.layers.block import Block, Rows, Shared, dropout
from t5x_like.layers.embedding import Embedding
from t5x_like.layers.norms import NORMS
from t5x_like.layers.param import declare, fold, normal, param, stacked
from t5x_like.layers.positions import rope_table
from t5x_like.models.config import ModelConfig
from t5x_like.parallel.sharding import constrain


class HeadWeight(nnx.Module):
    """Stored like the embedding, [V, D], so that there is one kind of head."""

    def __init__(self, *, vocab: int, embed: int, init: str):
        self.weight = param((vocab, embed), axes=("vocab", "embed"), init=init)


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: ModelConfig):
        c = config
        init = normal(c.init_deviation)
        learned = c.max_length if c.position == "learned" else 0
        self.embed = Embedding(vocab=c.padded_vocab, embed=c.embed, positions=learned, init=init)
        self.final_norm = NORMS[c.norm](c.embed, epsilon=c.norm_epsilon)
        if not c.tie_embeddings:
            self.head = HeadWeight(vocab=c.padded_vocab, embed=c.embed, init=init)


@dataclasses.dataclass(frozen=True)
class Declared:
    """The modules' structure and the specs of their parameters; `layer_specs` are those of one layer."""

    ends: nnx.GraphDef
    end_specs: Tree
    layer: nnx.GraphDef
    layer_specs: Tree


def declared(config: ModelConfig, *, dtype: str) -> Declared:
    ends, end_specs = declare(lambda: Ends(config), dtype=dtype)
    layer, layer_specs = declare(lambda: Block(config), dtype=dtype)
    return Declared(ends, end_specs, layer, layer_specs)


def specs(config: ModelConfig, parts: Declared) -> dict[str, Any]:
    return {**parts.end_specs, "layers": stacked(parts.layer_specs, config.layers)}


def cache_specs(config: ModelConfig, *, rows: int, length: int, dtype: str) -> dict[str, Any]:
    """{"self": the slots of self-attention}, of specs."""
    windows = [kind.window for kind in config.kinds]
    slots = kv_cache.slots_specs(
        windows, rows=rows, length=length, kv_heads=config.kv_heads, head_size=config.head, dtype=dtype
    )
    return {"self": slots}


def apply(
    config: ModelConfig,
    parts: Declared,
    params: Tree,
    batch: Mapping[str, Array],
    *,
    dtype: str,
    cache: dict[str, Any] | None,
    fresh_rows_R: Int[Array, " R"] | None,
    key: jax.Array | None,
) -> tuple[Float[Array, "B T D"], dict[str, Any] | None, dict[str, Any]]:
    """(hidden states after the final norm, the cache with this call's tokens, the layers' sums in their order).

    fresh_rows_R: the rows of the cache that the batch begins anew, without reading what is in them; None: the batch
    goes on in all of its rows.
    """
    ends = nnx.merge(parts.ends, {name: params[name] for name in parts.end_specs})
    fresh = fresh_rows_R is not None
    reads = cache is not None and not fresh
    rows = _rows(config, batch, positions_BT=_slot_positions(batch, fresh=fresh) if reads else None)
    shared = Shared(key=None if key is None else fold(key, "layers"))

    def block(weights, x_BTD, rows, *, kind, index, cache):
        # A module for the span of one call: its parameters are the arrays at hand.
        return nnx.merge(parts.layer, weights)(x_BTD, rows, shared, kind=kind, index=index, cache=cache)

    with jax.named_scope("embed"):
        x_BTD = ends.embed(batch["inputs"], batch.get("positions"), dtype=dtype)
        x_BTD = constrain(dropout(x_BTD, config.dropout, key, "embed"), "batch", "length", "act_embed")
    with jax.named_scope("layers"):
        x_BTD, outputs = stack.run(
            {"layers": block},
            {"layers": params["layers"]},
            x_BTD,
            rows,
            kinds=config.kinds,
            cache={**cache, "self": kv_cache.Fresh()} if cache is not None and fresh else cache,
            scan=config.scan or cache is not None,
            remat=config.remat,
        )
    with jax.named_scope("final_norm"):
        x_BTD = constrain(ends.final_norm(x_BTD), "batch", "length", "act_embed")
    if cache is not None:
        rows_R = fresh_rows_R if fresh else jnp.arange(x_BTD.shape[0])
        positions_BT = _after(x_BTD, _slot_positions(batch, fresh=fresh))
        cache = {**cache, "self": cache["self"].write(*outputs["cache"], positions_BT, rows_R, fresh=fresh)}
    return x_BTD, cache, outputs["sums"]


def _slot_positions(batch: Mapping[str, Array], *, fresh: bool) -> Int[Array, "B T"]:
    """What the cache's slots will say of each token: its position, or EMPTY for padding."""
    if fresh:
        positions_BT = jnp.broadcast_to(jnp.arange(batch["inputs"].shape[1], dtype=jnp.int32), batch["inputs"].shape)
    elif "positions" in batch:
        positions_BT = batch["positions"]
    else:
        raise ValueError("with a cache the batch needs 'positions': where in its row each token stands")
    if "segment_ids" not in batch:
        return positions_BT
    return jnp.where(batch["segment_ids"] == 0, kv_cache.EMPTY, positions_BT)


def _after(x_BTD: Array, positions_BT: Array) -> Array:
    """The positions, as numbers that cannot be known before x is.

    A write that might come before the last layer has read makes XLA's CPU compiler copy the cache, twice; a barrier is
    dropped before copies are decided. No position is below EMPTY, which the compiler does not know.
    """
    return jnp.where(jnp.isnan(x_BTD[:, :, 0]) & (positions_BT < kv_cache.EMPTY), kv_cache.EMPTY, positions_BT)


def _rows(config: ModelConfig, batch: Mapping[str, Array], *, positions_BT: Array | None) -> Rows:
    """positions_BT: for masks that do not go by index."""
    ropes = {}
    if config.position == "rope":
        angles_BT = batch.get("positions")
        if angles_BT is None:
            angles_BT = jnp.arange(batch["inputs"].shape[1], dtype=jnp.int32)[None, :]
        for theta in sorted({kind.rope_theta for kind in config.kinds}):
            ropes[theta] = rope_table(angles_BT, config.head, theta=theta, scaling=config.rope.scaling)
    return Rows(ropes=ropes, segments_BT=batch.get("segment_ids"), positions_BT=positions_BT)
