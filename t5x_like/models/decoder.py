"""A decoder: embedding, a stack of equal-shaped layers, final norm; and the head that scoring multiplies with.

It composes layers/ into functions of a plain tree of parameters. NOT here: the interface that the rest of the program
sees (model.py), logits and losses (layers/token_log_probs.py).

Legend: B batch, T length, D model, V vocab (padded), L layers, K kv heads, H head size.
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
from t5x_like.layers.block import Block, Shared, dropout
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


def cache_entries(config: ModelConfig, *, length: int) -> list[kv_cache.Entry]:
    windows = [kind.window for kind in config.kinds]
    return kv_cache.entries(windows, period=stack.period(config.kinds), length=length)


def apply(
    config: ModelConfig,
    parts: Declared,
    params: Tree,
    batch: Mapping[str, Array],
    *,
    dtype: str,
    cache: dict[str, Any] | None,
    key: jax.Array | None,
) -> tuple[Float[Array, "B T D"], dict[str, Any] | None]:
    """(hidden states after the final norm, the cache with this call's tokens)."""
    ends = nnx.merge(parts.ends, {name: params[name] for name in parts.end_specs})
    ids_BT, positions_BT = batch["inputs"], batch.get("positions")
    shared = _shared(config, batch, slot_positions_BT=None if cache is None else _slot_positions(batch), key=key)
    period = stack.period(config.kinds)
    entries = [] if cache is None else [cache[str(place)] for place in range(period)]
    caches = [{"k": entry["k"], "v": entry["v"]} for entry in entries]

    def block(weights, x_BTD, *, place, index, cache):
        # A module for the span of one call: its parameters are the arrays at hand.
        layer = nnx.merge(parts.layer, weights)
        if cache is not None:
            cache = {**cache, "positions": entries[place]["positions"]}
        return layer(x_BTD, shared, kind=config.kinds[place], index=index, cache=cache)

    with jax.named_scope("embed"):
        x_BTD = ends.embed(ids_BT, positions_BT, dtype=dtype)
        x_BTD = constrain(dropout(x_BTD, config.dropout, key, "embed"), "batch", "length", "act_embed")
    with jax.named_scope("layers"):
        x_BTD, new = stack.run(
            block,
            params["layers"],
            x_BTD,
            kinds=config.kinds,
            caches=caches or None,
            # With a cache always: unrolled, each token would pay for a copy of all weights out of the stack.
            scan=config.scan or cache is not None,
            remat=config.remat,
        )
    with jax.named_scope("final_norm"):
        x_BTD = constrain(ends.final_norm(x_BTD), "batch", "length", "act_embed")
    if cache is not None:
        k_LBTKH, v_LBTKH = new
        cache = kv_cache.write(cache, k_LBTKH, v_LBTKH, _slot_positions(batch), period=period)
    return x_BTD, cache


def _slot_positions(batch: Mapping[str, Array]) -> Int[Array, "B T"]:
    """What the cache's slots will say of each token: its position, or EMPTY for padding."""
    if "positions" not in batch:
        raise ValueError("with a cache the batch needs 'positions': where in its row each token stands")
    if "segment_ids" not in batch:
        return batch["positions"]
    return jnp.where(batch["segment_ids"] == 0, kv_cache.EMPTY, batch["positions"])


def _shared(
    config: ModelConfig, batch: Mapping[str, Array], *, slot_positions_BT: Array | None, key: jax.Array | None
) -> Shared:
    ropes = {}
    if config.position == "rope":
        positions_BT = batch.get("positions")
        if positions_BT is None:
            positions_BT = jnp.arange(batch["inputs"].shape[1], dtype=jnp.int32)[None, :]
        for theta in sorted({kind.rope_theta for kind in config.kinds} - {0.0}):  # 0: a layer without positions
            ropes[theta] = rope_table(positions_BT, config.head, theta=theta, scaling=config.rope.scaling.scaling)
    layers_key = None if key is None else fold(key, "layers")
    return Shared(ropes=ropes, segments_BT=batch.get("segment_ids"), positions_BT=slot_positions_BT, key=layers_key)
