"""Norms and rotary positions against their formulas, and what they promise in every number format."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_like.layers import norms, param, positions
from t5x_like.layers.embedding import Embedding

PLAIN = None
LLAMA3 = positions.Llama3(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_length=8192)


def module(kind, **params):
    graphdef, _ = param.declare(lambda: norms.NORMS[kind](8, epsilon=1e-5), dtype="float32")
    return nnx.merge(graphdef, {name: jnp.asarray(value, jnp.float32) for name, value in params.items()})


def test_norms_are_their_formulas():
    generator = np.random.default_rng(0)
    x, scale, bias = generator.normal(3.0, 2.0, (2, 5, 8)), generator.normal(size=8), generator.normal(size=8)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(module("rms", scale=scale)(x), rms, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(module("rms_plus_one", scale=scale - 1)(x), rms, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(module("layer", scale=scale, bias=bias)(x), layer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", norms.NORMS)
def test_norms_of_bfloat16_are_computed_in_float32_and_rounded_once(kind):
    params = {"scale": np.linspace(0.5, 2.0, 8)} | ({"bias": np.ones(8)} if kind == "layer" else {})
    norm = module(kind, **params)
    x = jnp.asarray(100 * np.random.default_rng(0).standard_normal((4, 8)), jnp.bfloat16)
    exact = norm(x.astype(jnp.float32))
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x), exact.astype(jnp.bfloat16))
    assert not np.array_equal(np.asarray(norm(x), np.float32), exact)


@jax.jit
def turned(x_BTNH, start=0):
    positions_BT = start + jnp.arange(x_BTNH.shape[1], dtype=jnp.int32)[None, :]
    table = positions.rope_table(positions_BT, x_BTNH.shape[-1], theta=100.0, scaling=PLAIN)
    return positions.rotate(x_BTNH, table)


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_rotation_is_a_complex_product_of_half_split_pairs():
    x = random(2, 7, 3, 8)
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    angles = np.arange(7)[:, None] * 100.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * angles)[None, :, None, :]
    np.testing.assert_allclose(turned(x), np.concatenate([expected.real, expected.imag], -1), rtol=1e-5, atol=1e-5)


def test_products_of_turned_queries_and_keys_depend_on_the_distance_alone():
    q, k = random(2, 1, 6, 1, 16)
    near, far = (np.einsum("BTNH,BSNH->TS", turned(q, start), turned(k, start)) for start in (0, 40))
    np.testing.assert_allclose(near, far, rtol=1e-3, atol=1e-4)
    assert not np.allclose(near, np.einsum("BTNH,BSNH->TS", q, k), atol=1e-2)


def test_gradient_of_a_rotation_turns_back():
    x = random(1, 5, 2, 8)
    there_and_back = jax.jit(lambda x: jax.vjp(turned, x)[1](turned(x))[0])
    np.testing.assert_allclose(there_and_back(x), x, rtol=1e-5, atol=1e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = (positions.frequencies(128, theta=5e5, scaling=scaling) for scaling in (PLAIN, LLAMA3))
    waves = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[waves < 8192 / 4], plain[waves < 8192 / 4])
    np.testing.assert_allclose(scaled[waves > 8192], plain[waves > 8192] / 8)
    between = (waves > 8192 / 4) & (waves < 8192)
    assert between.any() and ((scaled < plain) & (scaled > plain / 8))[between].all()


SCALINGS = {
    "linear": (positions.Linear(4.0), {"factor": 4.0}),
    "llama3": (
        LLAMA3,
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        positions.Yarn(16.0, 4096, 32.0, 1.0, 0.1 * math.log(16.0) + 1.0),
        {"factor": 16.0, "original_max_position_embeddings": 4096},
    ),
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_those_of_transformers(name, theta):
    pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    scaling, parameters = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=65_536,
        rope_parameters={"rope_type": name, "rope_theta": theta} | parameters,
    )
    expected, factor = rope_utils.ROPE_INIT_FUNCTIONS[name](config, "cpu")
    found = positions.frequencies(128, theta=theta, scaling=scaling)
    assert not np.allclose(found, positions.frequencies(128, theta=theta, scaling=None))
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    cosines, sines = positions.rope_table(jnp.array([[0, 3]]), 128, theta=theta, scaling=scaling)
    np.testing.assert_allclose(cosines[0, 0], factor, rtol=1e-6)
    np.testing.assert_allclose(np.hypot(cosines, sines), factor, rtol=1e-5)


def embedded(ids, places=None, token_types=None, *, dtype="float32", **settings):
    """(result, parameters) of an embedding of 8 numbers a token."""
    sizes = {"vocab": 16, "embed": 8, "init": "normal(1)"}
    graphdef, specs = param.declare(lambda: Embedding(**sizes, **settings), dtype="float32")
    params = param.initialize(specs, jax.random.key(0))
    return nnx.merge(graphdef, params)(ids, places, dtype=dtype, types_BT=token_types), params


IDS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)


def test_an_embedding_is_the_norm_of_scaled_tokens_types_and_positions():
    types = jnp.array([[0, 0, 1, 1, 1]] * 2, jnp.int32)
    settings = {"positions": 6, "offset": 2, "types": 2, "scale": 3.0, "norm": "layer", "norm_epsilon": 1e-5}
    out, p = embedded(IDS, None, types, **settings)
    assert p["positions"].shape == (8, 8) and p["types"].shape == (2, 8)
    x = 3 * p["tokens"][IDS] + p["types"][types] + p["positions"][None, 2:7]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, x, rtol=1e-4, atol=1e-5)
    placed, _ = embedded(IDS, jnp.array([[1, 0, 2, 3, 4]] * 2, jnp.int32), types, **settings)
    assert np.abs(placed[:, :2] - out[:, :2]).max() > 0.1
    np.testing.assert_array_equal(placed[:, 2:], out[:, 2:])
    np.testing.assert_array_equal(embedded(IDS, None, None, **settings)[0][:, :2], out[:, :2])


def test_the_scale_of_an_embedding_is_rounded_to_the_compute_type():
    out, p = embedded(IDS, positions=0, scale=math.sqrt(3072), dtype="bfloat16")
    expected = p["tokens"][IDS].astype(jnp.bfloat16) * jnp.bfloat16(55.5)
    assert out.dtype == jnp.bfloat16 and jnp.bfloat16(math.sqrt(3072)) == 55.5
    np.testing.assert_array_equal(out, expected)
