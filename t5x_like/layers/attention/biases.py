"""Position biases: numbers added to attention logits that depend on the distance from query to key and on the head.

A bias is a value (a registered pytree): its arrays may be parameters, and gradients reach them through every path of
attention. Which keys a query may see at all is a mask (masks.py); rotary positions are in positions.py.

Legend: B batch (of `table_BN`: buckets), T query length, S key length, N heads.
"""

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buckets:
    """T5's learned bias (arXiv 1910.10683, section 2.1): one number a head for each bucket of distances.

    Half of the buckets hold one distance each, the others hold ranges that grow logarithmically up to max_distance,
    beyond which all share the last. bidirectional: half of all buckets are for keys to the right; else those all fall
    into bucket 0.
    """

    table_BN: Any  # [buckets, N]; not checked, since tree transforms fill values with other things than arrays
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True})

    def matrix(self, q_positions: Int[Array, "#B T"], k_positions: Int[Array, "#B S"]) -> Float[Array, "#B N T S"]:
        return _by_position(self, q_positions, k_positions)

    def of_distances(self, distances: Int[Array, "..."]) -> Float[Array, "... N"]:
        numbers = bucket_numbers(
            distances, self.table_BN.shape[0], bidirectional=self.bidirectional, max_distance=self.max_distance
        )
        return jnp.take(self.table_BN.astype(jnp.float32), numbers, axis=0)

    def specs(self, heads: tuple[str, ...] | str | None) -> "Buckets":
        """Where its arrays lie when the heads are split over these mesh axes."""
        return jax.tree.map(lambda _: PartitionSpec(None, heads), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi:
    """Minus the distance times a number of each head, the slope (arXiv 2108.12409). `slopes` gives the usual ones."""

    slopes_N: Any  # [N]

    def matrix(self, q_positions: Int[Array, "#B T"], k_positions: Int[Array, "#B S"]) -> Float[Array, "#B N T S"]:
        return _by_position(self, q_positions, k_positions)

    def of_distances(self, distances: Int[Array, "..."]) -> Float[Array, "... N"]:
        slopes = self.slopes_N.astype(jnp.float32).reshape((1,) * distances.ndim + self.slopes_N.shape)
        return -slopes * jnp.abs(distances).astype(jnp.float32)[..., None]

    def specs(self, heads: tuple[str, ...] | str | None) -> "Alibi":
        """Where its arrays lie when the heads are split over these mesh axes."""
        return jax.tree.map(lambda _: PartitionSpec(heads), self)


Bias: TypeAlias = Buckets | Alibi


def slopes(heads: int) -> np.ndarray:
    """The slopes of ALiBi: 2 ** (-8 / n), its square, ... for n heads, n a power of two; other numbers of heads take
    those of the power below, then every second one of twice that power.

    >>> slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([first, between]).astype(np.float32)


def bucket_numbers(
    distances: Int[Array, "..."], buckets: int, *, bidirectional: bool, max_distance: int
) -> Int[Array, "..."]:
    """The bucket of each distance (key position - query position), in 0 .. buckets - 1."""
    first = jnp.zeros_like(distances)
    if bidirectional:
        buckets //= 2
        first = jnp.where(distances > 0, buckets, 0)
        steps = jnp.abs(distances)
    else:
        steps = jnp.maximum(-distances, 0)
    exact = buckets // 2  # distances with a bucket of their own
    ratio = jnp.log(jnp.maximum(steps, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(distances.dtype), buckets - 1)
    return first + jnp.where(steps < exact, steps, far)


def by_index(bias: Bias, q_length: int, k_length: int, *, q_start: int | Array = 0) -> Float[Array, "1 N T S"]:
    """The matrix when positions are indices, the first query being `q_start`.

    Each distance is looked up once, T + S - 1 in all, and its number is laid along its diagonal by copies alone: the
    gradient is a sum along diagonals, where that of a lookup for each element would be a slow scatter.
    """
    distances = jnp.arange(-(q_length - 1), k_length, dtype=jnp.int32) - q_start
    values_NR = bias.of_distances(distances).T
    if q_length == 1:
        return values_NR[None, :, None, :]
    N, R = values_NR.shape
    # Row t reads values[T - 1 - t :]. Copies of a row of R numbers, read in rows of R - 1, move by one a row.
    copies = jnp.broadcast_to(values_NR[:, None, :], (N, q_length, R)).reshape(N, q_length * R)
    moved = copies[:, q_length - 1 : q_length - 1 + q_length * (R - 1)].reshape(N, q_length, R - 1)
    return moved[None, :, :, :k_length]


def _by_position(bias: Bias, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    return bias.of_distances(k_positions[:, None, :] - q_positions[:, :, None]).transpose(0, 3, 1, 2)
