"""Products of training in int8: values and gradients against numpy, rounding, and a model that trains with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.types import Leaf, RandomLeaf
from t5x_like.layers import int8, weights
from t5x_like.layers.int8 import Int8Product
from tests.layers.attention.definition import make_mesh

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 3, 16), np.float32)
W = RANDOM.standard_normal((16, 4, 5), np.float32)
G = RANDOM.standard_normal((2, 3, 4, 5), np.float32)
EQUATION = "BTD,DNH->BTNH"


def leaf(w=W, *, backward=False, seeds=None):
    return Int8Product(jnp.asarray(w), seeds, ("layers", "embed", "heads", "head"), backward)


def rounded(a, dims):
    """(whole numbers, scales) by the definition."""
    scales = np.abs(a).max(axis=dims, keepdims=True) / 127
    return np.rint(a / scales), scales


def product_and_gradients(weight, x=X, g=G):
    def product(x, array):
        return weights.einsum(EQUATION, x, Int8Product(array, weight.seeds, weight.stored_axes, weight.backward))

    out, pull = jax.vjp(product, jnp.asarray(x), weight.array)
    return tuple(np.asarray(a) for a in (out, *pull(jnp.asarray(g))))


def test_a_weight_in_int8_is_a_leaf():
    weight = leaf()
    assert isinstance(weight, Leaf) and isinstance(weight, RandomLeaf)
    assert weight.axes == ("embed", "heads", "head") and leaf(W[None]).axes == weight.stored_axes


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}])
def test_the_product_is_that_of_whole_numbers_times_both_scales(sizes):
    q_x, s_x = rounded(X, 2)
    q_w, s_w = rounded(W, 0)
    expected = np.einsum(EQUATION, q_x, q_w) * s_x[..., None] * s_w
    with jax.set_mesh(make_mesh(sizes)):
        out, *_ = jax.jit(lambda: product_and_gradients_traced())()
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    exact = np.einsum(EQUATION, X, W)
    assert 1e-4 < np.abs(out - exact).max() / np.abs(exact).max() < 0.02


def product_and_gradients_traced():
    return (weights.einsum(EQUATION, jnp.asarray(X), leaf()),)


def test_gradients_go_straight_through_the_rounding():
    """They are those of the product of what was given, not of what it was rounded to."""
    _, g_x, g_w = product_and_gradients(leaf())
    np.testing.assert_allclose(g_x, np.einsum("BTNH,DNH->BTD", G, W), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(g_w, np.einsum("BTD,BTNH->DNH", X, G), rtol=1e-5, atol=1e-5)


def test_gradients_of_activations_in_int8_are_rounded_to_nearest_without_a_seed():
    _, g_x, g_w = product_and_gradients(leaf(backward=True))
    q_g, s_g = rounded(G, (2, 3))
    q_w, s_w = rounded(W, (1, 2))
    expected = np.einsum("BTNH,DNH->BTD", q_g, q_w) * s_g[..., 0] * s_w[:, 0, 0]
    np.testing.assert_allclose(g_x, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(g_w, np.einsum("BTD,BTNH->DNH", X, G), rtol=1e-5, atol=1e-5)


def test_stochastic_rounding_has_the_right_mean():
    """Over 4,000 seeds: within 5 standard errors of what was rounded, where rounding to nearest is 100 off."""
    x = jnp.asarray([[127.0, 0.3, -0.3, 5.49, -126.99, 0.0]])
    seeds = jax.random.bits(jax.random.key(0), (4000,), jnp.uint32)
    draws, scales = jax.vmap(lambda seed: int8.quantized(x, (1,), seed))(seeds)
    assert np.unique(scales) == 1.0
    values = np.asarray(draws, np.float64)[:, 0]
    fraction = np.asarray(x[0]) - np.floor(x[0])
    error = np.sqrt(fraction * (1 - fraction) / len(values))
    assert (np.abs(values.mean(axis=0) - np.asarray(x[0])) <= 5 * error + 1e-6).all()
    assert set(np.unique(values[:, 1])) == {0.0, 1.0} and set(np.unique(values[:, 4])) == {-127.0, -126.0}
    nearest, _ = int8.quantized(x, (1,))
    assert nearest.tolist() == [[127, 0, 0, 5, -127, 0]]


def test_rows_of_arrays_with_more_than_32_bits_of_places_have_numbers_of_their_own():
    """Rows 0 and 64 lie 2^32 elements apart. No other element of the array is made."""
    cut = (slice(0, 65, 64), slice(5, 6), slice(0, 4096))
    program = jax.jit(lambda seed: int8.uniform((65, 4096, 16384), seed)[cut]).lower(jnp.uint32(7)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**20
    first, last = np.asarray(program(jnp.uint32(7)), np.float64)[:, 0]
    assert abs(np.corrcoef(first, last)[0, 1]) < 0.1


def test_what_is_too_small_for_a_scale_is_zero():
    values, scales = int8.quantized(jnp.asarray([[1e-38, -4e-37], [1e-20, 0.0]]), (1,))
    np.testing.assert_array_equal(values, [[0, 0], [127, 0]])
    assert np.isfinite(np.asarray(scales)).all()


def test_numbers_of_the_hash_are_uniform_and_independent_of_their_neighbours():
    u = np.asarray(int8.uniform((400, 500), jnp.uint32(12345)), np.float64)
    assert 0 <= u.min() and u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)  # chi squared of 63 degrees
    others = [np.asarray(int8.uniform((400, 500), jnp.uint32(seed)), np.float64) for seed in (12346, 12345 + 2**31)]
    for one, other in [(u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), *((u, other) for other in others)]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(u.size)


def test_each_layer_step_and_micro_batch_rounds_otherwise():
    stack = leaf(np.stack([W] * 3), backward=True)
    seeds = [stack.with_key(jax.random.key(number)).seeds for number in range(2)]
    assert len(np.unique(np.concatenate(seeds))) == 6
    assert leaf(W[None]).with_key(jax.random.key(0)).seeds is None  # nothing is drawn in the forward pass
    dx = [product_and_gradients(leaf(backward=True, seeds=seed))[1] for seed in (*seeds[0], seeds[0][0])]
    assert (dx[0] != dx[1]).any() and (dx[0] == dx[3]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    x = X.copy()
    x[0, 1, 2] = bad
    out, *_ = product_and_gradients(leaf(), x=x)
    assert not np.isfinite(out[0, 1]).any() and np.isfinite(out[0, 0]).all()


def test_rows_of_zeros_give_zeros():
    out, g_x, _ = product_and_gradients(leaf(np.zeros_like(W), backward=True), x=np.zeros_like(X))
    assert (out == 0).all() and (g_x == 0).all()
