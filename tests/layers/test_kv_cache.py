"""Writing to a cache: each token once, in its slot, padding nowhere. Decoding through it is in tests/models."""

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers import kv_cache
from t5x_like.layers.param import initialize


def empty(windows, period, length, rows=2):
    parts = kv_cache.entries(windows, period=period, length=length)
    specs = kv_cache.specs(parts, rows=rows, kv_heads=1, head=1, dtype="float32")
    return initialize(specs, jax.random.key(0))


def written(cache, positions_BT, layers):
    """Keys are 100 * layer + position, values their negatives, so that every slot tells where its content is from."""
    positions_BT = jnp.asarray(positions_BT, jnp.int32)
    k = 100.0 * jnp.arange(layers)[:, None, None] + positions_BT[None, :, :]
    write = jax.jit(kv_cache.write, static_argnames="period")
    return write(cache, k[..., None, None], -k[..., None, None], positions_BT, period=len(cache.keys() - {"other"}))


def content(entry, layer):
    return np.where(np.asarray(entry["positions"]) < 0, -1, by_slot(entry["k"])[layer])


def by_slot(stored):
    """[layer, row, slot] of the one head of size one, whatever the layout."""
    return np.asarray(stored).reshape(stored.shape[0], stored.shape[1], -1)


def test_rows_of_different_length_are_written_and_padding_is_not():
    cache = written(empty((0, 0), 1, 6), [[0, 1, 2], [0, -1, -1]], 2)
    cache = written(cache, [[3], [1]], 2)
    np.testing.assert_array_equal(cache["0"]["positions"], [[0, 1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(content(cache["0"], 1), [[100, 101, 102, 103, -1, -1], [100, 101, -1, -1, -1, -1]])
    np.testing.assert_array_equal(by_slot(cache["0"]["v"]), -by_slot(cache["0"]["k"]))


def test_ring_keeps_the_last_tokens_even_of_one_long_write():
    cache = written(empty((3, 0, 3), 2, 8), [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]], 3)
    np.testing.assert_array_equal(cache["0"]["positions"], [[3, 4, 2], [0, 1, -1]])
    np.testing.assert_array_equal(content(cache["0"], 1), [[203, 204, 202], [200, 201, -1]])  # layer 2 is its second
    np.testing.assert_array_equal(cache["1"]["positions"][0], [0, 1, 2, 3, 4, -1, -1, -1])
    cache = written(cache, [[5], [2]], 3)
    np.testing.assert_array_equal(cache["0"]["positions"], [[3, 4, 5], [0, 1, 2]])


def test_what_else_is_in_the_cache_is_left_alone():
    cache = written(empty((0, 0), 1, 6) | {"other": jnp.ones(3)}, [[0, 1, 2], [0, -1, -1]], 2)
    np.testing.assert_array_equal(cache["0"]["positions"][0], [0, 1, 2, -1, -1, -1])
    np.testing.assert_array_equal(cache["other"], np.ones(3))


def test_a_window_longer_than_the_text_keeps_no_more_than_the_text():
    assert [part.slots for part in kv_cache.entries((50, 0), period=2, length=8)] == [8, 8]
