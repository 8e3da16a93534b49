"""A keyed permutation of range(n) in closed form: position -> element, with no table and no state.

A Feistel network over pairs (left, right) with left < a, right < b, a * b >= n, each round adding a keyed hash of one
half to the other modulo its size (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"); results that fall
outside the range are permuted again until they fall inside. Made for shuffling; no cryptography.
"""

import hashlib
import math

import numpy as np
from jaxtyping import Int

_ROUNDS = 8


def permute(positions: Int[np.ndarray, "any"], size: int, key: str) -> Int[np.ndarray, "any"]:
    """The elements of range(size) at `positions` of the order that `key` names.

    >>> sorted(permute(np.arange(5), 5, "epoch 0").tolist())
    [0, 1, 2, 3, 4]
    """
    left_size = math.isqrt(max(size - 1, 0)) + 1
    right_size = -(-size // left_size)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    result = np.array(positions, np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        result[outside] = _network(result[outside], np.uint64(left_size), np.uint64(right_size), keys)
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _network(values: np.ndarray, left_size: np.uint64, right_size: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = values // right_size, values % right_size
    for turn, key in enumerate(keys):
        if turn % 2:
            right = (right + mix(left ^ key) % right_size) % right_size
        else:
            left = (left + mix(right ^ key) % left_size) % left_size
    return left * right_size + right


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output. Arrays wrap silently."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
