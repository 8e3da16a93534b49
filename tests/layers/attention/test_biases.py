"""Position biases: bucket numbers and slopes beside transformers, the matrix by index beside that by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import biases
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.attention.materialised import attention_over_parts


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 50)])
def test_bucket_numbers_are_those_of_transformers(bidirectional, buckets, max_distance):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-600, 601, dtype=np.int32)
    expected = t5.T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    found = biases.bucket_numbers(
        jnp.asarray(distances), buckets, bidirectional=bidirectional, max_distance=max_distance
    )
    np.testing.assert_array_equal(found, expected)
    unused = {buckets // 2} if bidirectional else set()  # of the distance 0 to the right
    assert set(np.asarray(found).tolist()) == set(range(buckets)) - unused


@pytest.mark.parametrize("heads", [8, 12])
def test_slopes_are_those_of_transformers(heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    alibi = bloom.build_alibi_tensor(torch.ones((1, 5)), heads, torch.float32)
    np.testing.assert_allclose(biases.slopes(heads), alibi[:, 0, 1], rtol=1e-6)
    # It leaves out what is the same for all keys of a query.
    matrix = biases.Alibi(jnp.asarray(biases.slopes(heads))).matrix(jnp.full((1, 1), 4), jnp.arange(5)[None])
    np.testing.assert_allclose(matrix[0, :, 0], alibi[:, 0] - alibi[:, 0, 4:], rtol=1e-5, atol=1e-6)


def test_the_slopes_of_a_power_of_two_are_a_geometric_series():
    np.testing.assert_allclose(biases.slopes(8), 0.5 ** np.arange(1, 9))


BIASES = {
    "buckets": lambda values: biases.Buckets(values, True, 20),
    "one_way": lambda values: biases.Buckets(values, False, 20),
    "alibi": lambda values: biases.Alibi(values[0]),
}


@pytest.mark.parametrize("shape", [(7, 7, 0), (1, 9, 4), (6, 3, 0), (4, 12, 8)], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_by_index_is_by_position_of_the_index(name, shape):
    T, S, start = shape
    values = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, T, S)), jnp.float32)
    positions = start + jnp.arange(T)[None], jnp.arange(S)[None]

    def both(values):
        by_index = biases.by_index(BIASES[name](values), T, S, q_start=start)
        by_position = BIASES[name](values).matrix(*positions)
        return jnp.stack([by_index, by_position]), (by_index * weights).sum(), (by_position * weights).sum()

    (one, other), *_ = both(values)
    assert one.shape == (1, 3, T, S) and float(jnp.std(one)) > 0.1
    np.testing.assert_array_equal(one, other)
    g_index, g_position = (jax.jit(jax.grad(lambda x, i=i: both(x)[i]))(values) for i in (1, 2))
    assert np.abs(g_index).max() > 0.1
    np.testing.assert_allclose(g_index, g_position, rtol=1e-5, atol=1e-5)


def test_with_a_cache_the_bias_goes_by_positions():
    """Two new tokens beside a cache whose slots are in any order, as the last two rows of the whole."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, 6, 2, 4)), jnp.float32) for _ in range(3))
    bias = biases.Buckets(jnp.asarray(random.standard_normal((8, 2)), jnp.float32), False, 5)
    order = jnp.array([3, 0, 2, 1])
    new = jnp.array([[4, 5]] * 2, jnp.int32)
    old = MaskSpec(causal=True, q_positions_BT=new, k_positions_BS=jnp.stack([order] * 2).astype(jnp.int32))
    now = MaskSpec(causal=True, q_positions_BT=new, k_positions_BS=new)
    parts = [(k[:, order], v[:, order], old), (k[:, 4:], v[:, 4:], now)]
    split = jax.jit(lambda: attention_over_parts(q[:, 4:], parts, scale=0.5, bias=bias))()
    whole = jax.jit(lambda: attention(q, k, v, MaskSpec(causal=True), scale=0.5, bias=bias))()
    without = jax.jit(lambda: attention(q, k, v, MaskSpec(causal=True), scale=0.5))()
    assert np.abs(whole - without).max() > 0.1
    np.testing.assert_allclose(split, whole[:, 4:], rtol=1e-5, atol=1e-5)
