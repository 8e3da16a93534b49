"""Keys and values of other tokens, kept for decoding. A cache is a value: layers attend through it, and what they give
(the keys and values of their own tokens) is written once for all layers, after the stack has run.

`Slots` is self-attention's: rows of slots that know the position of their token, so that rows of different lengths,
padding and windows need nothing else. Layers with a window keep a ring of that many slots: a token's slot is its
position modulo the slots. `Fresh` is what rows attend through that have no earlier tokens (prefill). `Cross` holds the
keys and values of an encoder, which never change. Layers read by number, and no layer's part is ever cut out.
NOT here: the mathematics of attention, paging, batching of requests.

Legend: B rows of the cache, R rows of a call, T new tokens, S slots or encoder tokens, L layers, n layers of one ring,
N heads, K kv heads, H head size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.core.types import ParamSpec
from t5x_like.layers.attention.biases import Bias
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.attention.materialised import attention_over_parts
from t5x_like.layers.param import ZEROS

EMPTY = -1  # the position in a slot that holds no token, and of a token that is padding


class Cache(Protocol):
    """What self-attention of any layer attends through."""

    def attend(
        self,
        q_BTNH: Float[Array, "R T N H"],
        k_BTKH: Float[Array, "R T K H"],
        v_BTKH: Float[Array, "R T K H"],
        mask: MaskSpec,
        *,
        layer: int | Array,
        scale: float,
        softcap: float | None,
        bias: Bias | None,
        block: int,
    ) -> Float[Array, "R T N H"]:
        """Attention of new tokens over what `layer` has kept and over one another. mask: among the new tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Fresh:
    """No earlier tokens: attention among those of the call, by index, so that the kernels of training serve it."""

    def attend(self, q_BTNH, k_BTKH, v_BTKH, mask: MaskSpec, *, layer, **how: Any):
        del layer
        return attention(q_BTNH, k_BTKH, v_BTKH, mask, **how)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    """The slots of all layers with one window. layers: their numbers in the stack, ascending.

    Keys and values are one array, for layers that run scanned, or a tuple of one a layer, for layers that run one by
    one: on a CPU each then reads its own where it lies, without a copy out of a stack. Heads come before slots, because
    a tile of a TPU's memory then holds slots of one head, as attention wants them.
    """

    k: Any  # [n, B, K, S, H], or n times [B, K, S, H]
    v: Any
    positions: Any  # [B, S]
    layers: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def of(self, layer: int | Array) -> tuple[Array, Array]:
        """Keys and values [B, S, K, H] of one layer."""
        number = _number(layer, self.layers)
        k_BKSH, v_BKSH = (
            a[number] if isinstance(a, tuple) else jax.lax.dynamic_index_in_dim(a, number, 0, keepdims=False)
            for a in (self.k, self.v)
        )
        return k_BKSH.transpose(0, 2, 1, 3), v_BKSH.transpose(0, 2, 1, 3)

    def write(self, k_LRTKH: Array, v_LRTKH: Array, positions_RT: Array, rows_R: Array, *, fresh: bool) -> "Ring":
        slots_RT = _slots(positions_RT, self.positions.shape[1])
        positions_BS = self.positions.at[rows_R].set(EMPTY) if fresh else self.positions
        return Ring(
            k=_put(self.k, _of_layers(k_LRTKH, self.layers), rows_R, slots_RT),
            v=_put(self.v, _of_layers(v_LRTKH, self.layers), rows_R, slots_RT),
            positions=positions_BS.at[rows_R[:, None], slots_RT].set(positions_RT, mode="drop"),
            layers=self.layers,
        )

    def repeated(self, times: int) -> "Ring":
        rows = 0 if isinstance(self.k, tuple) else 1
        k, v = (jax.tree.map(lambda a: jnp.repeat(a, times, axis=rows), values) for values in (self.k, self.v))
        return Ring(k=k, v=v, positions=jnp.repeat(self.positions, times, axis=0), layers=self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The cache of self-attention: a ring for each window among the layers, 0 for those that see all."""

    rings: dict[int, Ring]

    def attend(
        self, q_BTNH, k_BTKH, v_BTKH, mask: MaskSpec, *, layer, scale: float, softcap: float | None, bias, block
    ):
        """mask says positions; its window chooses the ring."""
        del block  # no kernel reads a cache
        ring = self.rings[mask.window or 0]
        old = MaskSpec(
            causal=True, window=mask.window, q_positions_BT=mask.q_positions_BT, k_positions_BS=ring.positions
        )
        parts = [(*ring.of(layer), old), (k_BTKH, v_BTKH, mask)]
        return attention_over_parts(q_BTNH, parts, scale=scale, softcap=softcap, bias=bias)

    def write(
        self,
        k_LRTKH: Float[Array, "L R T K H"],
        v_LRTKH: Float[Array, "L R T K H"],
        positions_RT: Int[Array, "R T"],
        rows_R: Int[Array, " R"],
        *,
        fresh: bool = False,
    ) -> "Slots":
        """The cache with new tokens of all layers in the rows of these numbers. Padding, whose position is EMPTY, is
        left out. fresh: the rows begin anew, and what they held is gone."""
        rings = {
            window: ring.write(k_LRTKH, v_LRTKH, positions_RT, rows_R, fresh=fresh)
            for window, ring in self.rings.items()
        }
        return Slots(rings)

    def repeated(self, times: int) -> "Slots":
        """Each row `times` times, one behind the other."""
        return Slots({window: ring.repeated(times) for window, ring in self.rings.items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
    """An encoder's keys and values for the cross-attention of every layer; only read.

    segments: of the encoder's tokens; a query sees those of its own segment, and 0 is padding.
    """

    k: Any  # [L, B, K, S, H]
    v: Any  # [L, B, K, S, H]
    segments: Any  # [B, S]

    def of_rows(self, rows_R: Int[Array, " R"]) -> "Cross":
        """What these rows attend to: a copy, so for a prefill only."""
        return Cross(k=self.k[:, rows_R], v=self.v[:, rows_R], segments=self.segments[rows_R])

    def repeated(self, times: int) -> "Cross":
        """Each row `times` times, one behind the other."""
        k, v = (jnp.repeat(a, times, axis=1) for a in (self.k, self.v))
        return Cross(k=k, v=v, segments=jnp.repeat(self.segments, times, axis=0))

    def attend(
        self,
        q_BTNH: Float[Array, "B T N H"],
        segments_BT: Int[Array, "B T"] | None,
        *,
        layer: int | Array,
        scale: float,
        softcap: float | None,
        block: int,
    ) -> Float[Array, "B T N H"]:
        """segments_BT: of the queries, None for one segment."""
        k_BKSH, v_BKSH = (jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False) for a in (self.k, self.v))
        if segments_BT is None:
            segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
        mask = MaskSpec(causal=False, q_segments_BT=segments_BT, k_segments_BS=self.segments)
        k_BSKH, v_BSKH = k_BKSH.transpose(0, 2, 1, 3), v_BKSH.transpose(0, 2, 1, 3)
        return attention(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, block=block)


# Before there are arrays: the same values, of specs.


def slots_specs(
    windows: Sequence[int], *, rows: int, length: int, kv_heads: int, head_size: int, dtype: str, stacked: bool = True
) -> Slots:
    """`Slots` of specs for `rows` texts of up to `length` tokens. windows: of each layer, 0 for all tokens.
    stacked: whether the layers of a ring are one array."""
    axes = (None, "batch", "act_kv_heads", "kv_length", "head")  # of all layers on each stage: rows lie there
    rings = {}
    for window in sorted(set(windows)):
        layers = tuple(number for number, other in enumerate(windows) if other == window)
        slots = min(window, length) if window else length
        values: Any = ParamSpec((len(layers), rows, kv_heads, slots, head_size), dtype, axes, ZEROS)
        if not stacked:
            values = (ParamSpec(values.shape[1:], dtype, axes[1:], ZEROS),) * len(layers)
        positions = ParamSpec((rows, slots), "int32", ("batch", "kv_length"), f"constant({EMPTY})")
        rings[window] = Ring(k=values, v=values, positions=positions, layers=layers)
    return Slots(rings)


def cross_specs(*, layers: int, rows: int, length: int, kv_heads: int, head_size: int, dtype: str) -> Cross:
    """`Cross` of specs, for encoder rows of `length` tokens."""
    axes = (None, "batch", "act_kv_heads", "kv_length", "head")
    values = ParamSpec((layers, rows, kv_heads, length, head_size), dtype, axes, ZEROS)
    segments = ParamSpec((rows, length), "int32", ("batch", "kv_length"), ZEROS)
    return Cross(k=values, v=values, segments=segments)


def _number(layer: int | Array, layers: Sequence[int]) -> int | Array:
    """Which of `layers` this one is."""
    if isinstance(layer, int):
        return layers.index(layer)
    if tuple(layers) == tuple(range(len(layers))):
        return layer
    table = np.zeros(layers[-1] + 1, np.int32)
    table[list(layers)] = range(len(layers))
    return jnp.asarray(table)[layer]


def _of_layers(new_LRTKH: Array, layers: Sequence[int]) -> Array:
    """The new keys or values of some layers."""
    if len(layers) == len(new_LRTKH):
        return new_LRTKH
    steps = set(np.diff(layers).tolist())
    if len(steps) <= 1:
        return new_LRTKH[layers[0] : layers[-1] + 1 : max(steps, default=1)]
    return new_LRTKH[np.asarray(layers)]


def _put(cache: Any, new_nRTKH: Array, rows_R: Array, slots_RT: Array) -> Any:
    """The keys or values of a ring with new ones at these rows and slots."""
    if isinstance(cache, tuple):
        written = [
            a.at[rows_R[:, None], :, slots_RT].set(new_nRTKH[number].astype(a.dtype), mode="drop")
            for number, a in enumerate(cache)
        ]
        return tuple(written)
    # Layers are counted in the index: as part of what is written in one piece, they decide the layout on a TPU, which
    # costs four copies of the whole cache a step where a device has one kv head.
    layers_n11 = jnp.arange(cache.shape[0])[:, None, None]
    return cache.at[layers_n11, rows_R[None, :, None], :, slots_RT[None]].set(
        new_nRTKH.astype(cache.dtype), mode="drop"
    )


def _slots(positions_RT: Int[Array, "R T"], slots: int) -> Int[Array, "R T"]:
    """Where each token goes; `slots`, which is past the end and dropped, for padding and for what a longer text
    overwrites within this very call (two tokens must not meet in one slot: the winner would be undefined)."""
    last_R1 = positions_RT.max(axis=1, keepdims=True)
    kept = (positions_RT >= 0) & (positions_RT > last_R1 - slots)
    return jnp.where(kept, positions_RT % slots, slots)
