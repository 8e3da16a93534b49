"""Keys and values of earlier tokens, kept for decoding: layout, empty cache, and the one write after the stack has run.

Blocks only read a cache; what they return are the new keys and values of their own tokens. Slots hold the position of
their token (-1: empty), and masks come from these positions, so rows of different lengths, padding and windows need
nothing else. A layer with a window keeps a ring of that many slots: a token's slot is its position modulo the slots.
NOT here: attention over a cache (`attention_over_parts`), paging, batching of requests.

Legend: B batch (rows), T new tokens, S slots, K kv heads, H head size, n layers of one entry.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.core.types import ParamSpec
from t5x_like.layers.param import ZEROS

EMPTY = -1  # the position in a slot that holds no token, and of a token that is padding


@dataclasses.dataclass(frozen=True)
class Entry:
    """One place in the period of layers: `layers` layers that keep `slots` slots."""

    layers: int
    slots: int


def entries(windows: Sequence[int], *, period: int, length: int) -> list[Entry]:
    """The cache entries of layers with these windows (0: none), for texts of up to `length` tokens."""
    result = []
    for place in range(period):
        window = windows[place]
        slots = min(window, length) if window else length
        result.append(Entry(layers=len(windows[place::period]), slots=slots))
    return result


def specs(parts: Sequence[Entry], *, rows: int, kv_heads: int, head: int, dtype: str) -> dict[str, Any]:
    """{place in the period: {"k", "v": [n, B, K, S, H], "positions": [B, S]}}.

    Heads come before slots, because a tile of a TPU's memory then holds slots of one head, as attention wants them.
    """
    axes = ("layers", "batch", "act_kv_heads", "kv_length", "head")
    tree: dict[str, Any] = {}
    for place, part in enumerate(parts):
        values = ParamSpec((part.layers, rows, kv_heads, part.slots, head), dtype, axes, ZEROS)
        positions = ParamSpec((rows, part.slots), "int32", ("batch", "kv_length"), f"constant({EMPTY})")
        tree[str(place)] = {"k": values, "v": values, "positions": positions}
    return tree


def write(
    cache: dict[str, Any],
    k_LBTKH: Float[Array, "L B T K H"],
    v_LBTKH: Float[Array, "L B T K H"],
    positions_BT: Int[Array, "B T"],
    *,
    period: int,
) -> dict[str, Any]:
    """The cache with the new tokens of all layers, each written once. Padding has position EMPTY and is left out.

    What else is in the cache beside the `period` entries stays as it is.
    """
    written = dict(cache)
    for place in range(period):
        part = cache[str(place)]
        slots_BT = _slots(positions_BT, part["positions"].shape[1])
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        written[str(place)] = {
            "k": _put(part["k"], k_LBTKH[place::period], rows_B1, slots_BT),
            "v": _put(part["v"], v_LBTKH[place::period], rows_B1, slots_BT),
            "positions": part["positions"].at[rows_B1, slots_BT].set(positions_BT, mode="drop"),
        }
    return written


def _put(cache_nBKSH: jax.Array, new_nBTKH: jax.Array, rows_B1: jax.Array, slots_BT: jax.Array) -> jax.Array:
    # Layers are counted in the index: as part of what is written in one piece, they decide the layout on a TPU, which
    # costs four copies of the whole cache a step where a device has one kv head.
    layers_n11 = jnp.arange(cache_nBKSH.shape[0])[:, None, None]
    new_nBTKH = new_nBTKH.astype(cache_nBKSH.dtype)
    return cache_nBKSH.at[layers_n11, rows_B1[None], :, slots_BT[None]].set(new_nBTKH, mode="drop")


def _slots(positions_BT: Int[Array, "B T"], slots: int) -> Int[Array, "B T"]:
    """Where each token goes; `slots`, which is past the end and dropped, for padding and for what a longer text
    overwrites within this very call (two tokens must not meet in one slot: the winner would be undefined)."""
    last_B1 = positions_BT.max(axis=1, keepdims=True)
    kept = (positions_BT >= 0) & (positions_BT > last_B1 - slots)
    return jnp.where(kept, positions_BT % slots, slots)
