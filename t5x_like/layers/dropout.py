"""Dropout, whose mask is a function of the key and of a row's number alone: a part of a batch that knows the numbers of
its rows draws for each of them what the whole batch would.

Legend: B rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, UInt32

from t5x_like.layers.param import fold


def dropout(
    x: jax.Array,
    rate: float,
    key: jax.Array | None,
    purpose: str,
    *,
    numbers_B: UInt32[Array, " B"] | None = None,
) -> jax.Array:
    """Sets a share `rate` of x [B, ...] to zero and scales the rest to keep the mean; the identity without a key.

    numbers_B: the numbers that these rows have in the whole batch; None where they are all of it.
    """
    if key is None or rate == 0.0:
        return x
    key = fold(key, purpose)
    if numbers_B is None:
        kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    else:
        kept = _uniform(key, numbers_B, x.shape[1:]) < np.float32(1.0 - rate)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))


def draws_by_row() -> bool:
    """Whether jax's numbers are a function of an element's place, as it is set here, so that some rows can be drawn."""
    config: Any = jax.config
    return config.jax_default_prng_impl == "threefry2x32" and config.jax_threefry_partitionable


def _uniform(key: jax.Array, numbers_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The rows of these numbers of `jax.random.uniform(key, (any number of rows, *shape))`, in float32.

    jax's threefry hashes the place of each element in the whole array, a number of 64 bits as two of 32
    (jax_threefry_partitionable, its default), and makes a float of the upper 23 bits.
    """
    assert draws_by_row() and jax.random.key_impl(key) == "threefry2x32"
    size = int(np.prod(shape, dtype=np.int64))
    assert size < 2**32
    inside = jnp.arange(size, dtype=jnp.uint32).reshape(1, *shape)
    high, low = (a.reshape(-1, *(1,) * len(shape)) for a in _times(numbers_B, size))
    places = low + inside
    carry = (places < low).astype(jnp.uint32)
    one, other = jax.random.key_data(key)
    bits = jnp.bitwise_xor(*threefry2x32_p.bind(one, other, jnp.broadcast_to(high + carry, places.shape), places))
    floats = jax.lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32)  # from 1 to 2
    return floats - 1.0


def _times(numbers: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """numbers x factor, of numbers and a factor below 2^32: the upper and the lower 32 bits."""
    low, high = numbers & 0xFFFF, numbers >> 16
    factor_low, factor_high = np.uint32(factor & 0xFFFF), np.uint32(factor >> 16)
    one, other = high * factor_low, low * factor_high  # both count from bit 16 on
    middle = (low * factor_low >> 16) + (one & 0xFFFF) + (other & 0xFFFF)
    return high * factor_high + (one >> 16) + (other >> 16) + (middle >> 16), numbers * np.uint32(factor)
