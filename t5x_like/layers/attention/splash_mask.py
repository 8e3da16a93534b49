"""What splash is told of a mask, and which queries each shard of a row computes under it.

Under a causal mask late queries see more keys: of n shards with a contiguous part of the queries each, the last does
(2n - 1) / n times the mean work, and all wait for it. So each shard computes the first half of its own queries and the
second half of those of its mirror shard, n - 1 - i for shard i. Of 2n chunks of queries it then has 2i and 2n - 1 - 2i,
and any two such chunks see equally many keys together. Queries go out and outputs come back by one permutation each,
inside of attention: data, positions and losses know nothing of it. Keys and values are NOT handled here; each shard has
them of whole rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash_library

from t5x_like.layers.attention.masks import MaskSpec

# The share of its work that the busiest shard has to save for an exchange of queries to be worth its two permutations.
WORTH = 0.1


@dataclasses.dataclass(frozen=True)
class Distance:
    """Which key a query sees, from their indices: what is static of a MaskSpec. The kernel calls it too."""

    causal: bool
    window: int | None

    def __call__(self, q: Any, k: Any) -> Any:
        seen = q >= k if self.causal else None
        if self.window is not None:
            near = q - (self.window - 1) <= k
            seen = near if seen is None else seen & near
            if not self.causal:
                seen &= q + (self.window - 1) >= k
        return seen


class BlockMask(splash_library.Mask):
    """A mask by distance in splash's words, for queries in any order. Splash makes its tables of blocks by asking for
    every block of the matrix, twice a kernel, so a block that is all alike is not computed: of 131,072 tokens a table
    takes 1.7 s, and 28 s by splash's own CausalMask, which makes the same.

    length: of the row. q_sequence: the queries' indices in the order of computation; consecutive within a block.
    """

    def __init__(self, length: int, mask_function: Distance, q_sequence: np.ndarray):
        self.length, self.mask_function, self.q_sequence = length, mask_function, q_sequence

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), self.length

    def __getitem__(self, blocks: tuple[slice, slice]) -> np.ndarray:
        q, k = self.q_sequence[blocks[0]], np.arange(self.length, dtype=np.int32)[blocks[1]]
        distances = int(q.min()) - int(k[-1]), int(q.max()) - int(k[0])  # the least and the largest
        reach = self.mask_function
        low = 0 if reach.causal else -np.inf if reach.window is None else 1 - reach.window
        high = np.inf if reach.window is None else reach.window - 1
        if distances[1] < low or distances[0] > high:
            return _alike(False, (len(q), len(k)))
        if low <= distances[0] and distances[1] <= high:
            return _alike(True, (len(q), len(k)))
        return reach(q[:, None], k[None, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, Distance, bytes]:
        return self.length, self.mask_function, self.q_sequence.tobytes()


@functools.lru_cache(maxsize=8)
def _alike(value: bool, shape: tuple[int, int]) -> np.ndarray:
    block = np.full(shape, value)
    block.flags.writeable = False
    return block


def block_mask(mask: MaskSpec, length: int, *, shards: int, exchanged: bool) -> splash_library.Mask:
    """What is static of the mask: blocks that it empties are left out. Segments are compared in the kernel."""
    if not mask.causal and mask.window is None:
        return splash_library.FullMask((length, length))
    order = np.arange(length, dtype=np.int32)
    return BlockMask(length, Distance(mask.causal, mask.window), exchanged_order(order, shards) if exchanged else order)


def exchanges(mask: MaskSpec, length: int, *, shards: int, multiple: int) -> bool:
    """Whether shards exchange queries: where the mask leaves the busiest of them WORTH more than an exchange does.
    multiple: of what half a shard's queries must be one, for the kernel's blocks.

    >>> exchanges(MaskSpec(causal=True), 8192, shards=8, multiple=128)
    True
    >>> exchanges(MaskSpec(causal=True, window=512), 8192, shards=8, multiple=128)
    False
    """
    if shards == 1 or not mask.causal or length % (2 * shards * multiple):
        return False
    now, then = (work(mask, length, shards=shards, exchanged=exchanged).max() for exchanged in (False, True))
    return bool(then <= (1 - WORTH) * now)


def work(mask: MaskSpec, length: int, *, shards: int, exchanged: bool) -> np.ndarray:
    """Pairs of a query and a key that a causal mask lets it see, of each shard.

    >>> work(MaskSpec(causal=True), 8, shards=2, exchanged=False).tolist()
    [10, 26]
    >>> work(MaskSpec(causal=True), 8, shards=2, exchanged=True).tolist()
    [18, 18]
    """
    seen = np.minimum(np.arange(1, length + 1), length if mask.window is None else mask.window)
    return (exchanged_order(seen, shards) if exchanged else seen).reshape(shards, -1).sum(axis=1)


def exchanged_order(x: np.ndarray, shards: int) -> np.ndarray:
    """What `exchange` makes of a whole row.

    >>> exchanged_order(np.arange(8), 2).tolist()
    [0, 1, 6, 7, 4, 5, 2, 3]
    """
    chunks = x.reshape(shards, 2, -1).copy()
    chunks[:, 1] = chunks[::-1, 1]
    return chunks.reshape(-1)


def exchange(x_BT: jax.Array, axes: tuple[str, ...], shards: int) -> jax.Array:
    """Inside of a shard_map: the second half of dim 1 for that of the mirror shard. Done twice it is the identity."""
    half = x_BT.shape[1] // 2
    pairs = [(shard, shards - 1 - shard) for shard in range(shards)]
    return jnp.concatenate([x_BT[:, :half], jax.lax.ppermute(x_BT[:, half:], axes, pairs)], axis=1)
