"""Caches as values: writing each token once, in its slot and row, padding nowhere; attending to an encoder's keys.
Decoding through a cache is in tests/models."""

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.attention import kv_cache
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.param import empty as arrays


def empty(windows, length, rows=2):
    specs = kv_cache.slots_specs(windows, rows=rows, length=length, kv_heads=1, head_size=1, dtype="float32")
    return arrays(specs)


def written(cache, positions_RT, rows_R=None, fresh=False):
    """Keys are 100 * layer + position, values their negatives, so that every slot tells where its content is from."""
    positions_RT = jnp.asarray(positions_RT, jnp.int32)
    layers = sum(len(ring.layers) for ring in cache.rings.values())
    k = 100.0 * jnp.arange(layers)[:, None, None] + positions_RT[None, :, :]
    rows_R = jnp.arange(len(positions_RT)) if rows_R is None else jnp.asarray(rows_R)
    write = jax.jit(kv_cache.Slots.write, static_argnames="fresh")
    return write(cache, k[..., None, None], -k[..., None, None], positions_RT, rows_R, fresh=fresh)


def content(ring, number):
    return np.where(np.asarray(ring.positions) < 0, -1, by_slot(ring.k)[number])


def by_slot(stored):
    """[layer, row, slot] of the one head of size one, whatever the layout."""
    return np.asarray(stored).reshape(stored.shape[0], stored.shape[1], -1)


def test_rows_of_different_length_are_written_and_padding_is_not():
    cache = written(empty((0, 0), 6), [[0, 1, 2], [0, -1, -1]])
    ring = written(cache, [[3], [1]]).rings[0]
    np.testing.assert_array_equal(ring.positions, [[0, 1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(content(ring, 1), [[100, 101, 102, 103, -1, -1], [100, 101, -1, -1, -1, -1]])
    np.testing.assert_array_equal(by_slot(ring.v), -by_slot(ring.k))


def test_a_ring_keeps_the_last_tokens_even_of_one_long_write():
    cache = written(empty((3, 0, 3), 8), [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]])
    np.testing.assert_array_equal(cache.rings[3].positions, [[3, 4, 2], [0, 1, -1]])
    np.testing.assert_array_equal(content(cache.rings[3], 1), [[203, 204, 202], [200, 201, -1]])  # its second: layer 2
    np.testing.assert_array_equal(cache.rings[0].positions[0], [0, 1, 2, 3, 4, -1, -1, -1])
    cache = written(cache, [[5], [2]])
    np.testing.assert_array_equal(cache.rings[3].positions, [[3, 4, 5], [0, 1, 2]])


def test_layers_of_one_window_share_a_ring_whatever_their_pattern():
    cache = written(empty((0, 0, 3, 0), 4), [[0, 1, 2, 3]])
    assert [ring.layers for ring in cache.rings.values()] == [(0, 1, 3), (2,)]
    np.testing.assert_array_equal(content(cache.rings[0], 2)[0], [300, 301, 302, 303])
    np.testing.assert_array_equal(content(cache.rings[3], 0)[0], [203, 201, 202])


def test_a_fresh_row_forgets_what_it_held_and_other_rows_stay():
    cache = written(empty((0,), 6, rows=4), [[0, 1, 2, 3]] * 4)
    after = written(cache, [[0, 1], [0, -1]], rows_R=[3, 1], fresh=True)
    expected = [[0, 1, 2, 3, -1, -1], [0, -1, -1, -1, -1, -1], [0, 1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1]]
    np.testing.assert_array_equal(after.rings[0].positions, expected)
    np.testing.assert_array_equal(content(after.rings[0], 0), expected)
    kept = written(cache, [[4]], rows_R=[3])
    np.testing.assert_array_equal(kept.rings[0].positions[3], [0, 1, 2, 3, 4, -1])


def test_a_window_longer_than_the_text_keeps_no_more_than_the_text():
    cache = empty((50, 0), 8)
    assert [ring.positions.shape[1] for ring in cache.rings.values()] == [8, 8]


def test_cross_attention_reads_the_layer_of_its_number_and_no_padding():
    generator = np.random.default_rng(0)
    k, v = (jnp.asarray(generator.standard_normal((3, 2, 2, 5, 4)), jnp.float32) for _ in range(2))
    q_BTNH = jnp.asarray(generator.standard_normal((2, 3, 4, 4)), jnp.float32)
    segments = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    cross = kv_cache.Cross(k=k, v=v, segments=segments)
    attend = jax.jit(lambda cross, layer: cross.attend(q_BTNH, None, layer=layer, scale=0.5, softcap=None, block=1024))
    out_BTNH = attend(cross, 1)
    for row, length in enumerate((3, 5)):
        keys, values = (a[1, row : row + 1, :, :length].transpose(0, 2, 1, 3) for a in (k, v))
        alone = attention(q_BTNH[row : row + 1], keys, values, MaskSpec(causal=False), scale=0.5)
        np.testing.assert_allclose(out_BTNH[row], alone[0], atol=1e-6)
    assert not np.allclose(out_BTNH, attend(cross, 2))
