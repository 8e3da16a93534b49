"""int8 weights: their grid, and their products beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from t5x_like.compress import choice, quant_array
from t5x_like.compress.quant_array import QuantArray, quantized
from t5x_like.core import tree
from t5x_like.core.types import Leaf, ParamSpec
from t5x_like.layers import weights
from t5x_like.layers.scoring.head import Head, logits
from tests.models import cases


def _leaf(shape, dims, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return w, QuantArray(*map(jnp.asarray, quantized(w, dims)), ("a",) * w.ndim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_weight_is_off_by_at_most_half_a_scale(dtype):
    generator = np.random.default_rng(0)
    w = generator.standard_normal((3, 50, 70)) * 10.0 ** generator.uniform(-6, 3, (3, 1, 70))
    w = np.asarray(jnp.asarray(w, dtype))
    values, scale = quantized(w, (1,))
    assert values.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == (3, 1, 70)
    error = np.abs(w.astype(np.float64) - values * scale.astype(np.float64))
    assert (error <= 0.5 * scale * (1 + 1e-5)).all() and error.max() > 0
    used = w.astype(np.float32) != 0  # of float16 the smallest channels vanish
    assert (np.abs(values).max(axis=1)[used.any(axis=1)] == 127).all()


def test_ties_round_to_even_and_what_is_too_small_becomes_zero():
    w = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0, 0, 0, 0, 0, 0], [1e-42, 0, 0, 0, 0, -1e-42]], np.float32)
    values, scale = quantized(w, (1,))
    np.testing.assert_array_equal(values, [[127, 0, 2, 2, 0, -2], [0] * 6, [0] * 6])
    np.testing.assert_array_equal(scale[:, 0], [1, 1, 1])


PRODUCTS = {
    "BTD,DF->BTF": ((24,), (40, 24), (0,)),
    "BTD,DNH->BTNH": ((24,), (24, 4, 8), (0,)),
    "BTNH,NHD->BTD": ((4, 8), (4, 8, 24), (0, 1)),
}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("equation", PRODUCTS)
def test_products_are_those_of_the_written_out_weight(equation, tokens, devices, monkeypatch):
    monkeypatch.setattr(quant_array, "BLOCK_BYTES", 4 * 32 * 5)  # several blocks
    _, shape, dims = PRODUCTS[equation]
    contracted = shape[: len(dims)]
    w, leaf = _leaf(shape, dims)
    assert isinstance(leaf, Leaf) and leaf.kind == "int8"
    x = np.random.default_rng(1).standard_normal((1, tokens, *contracted)).astype(np.float32)
    exact = np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
    assert np.abs(exact - w).max() > 1e-3
    with jax.set_mesh(Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))):
        product = jax.jit(lambda x, leaf: weights.einsum(equation, x, leaf))(x, leaf)
    np.testing.assert_allclose(product, np.einsum(equation, x, exact), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights.dense(leaf, "float32"), np.asarray(leaf.values, np.float32) * leaf.scale)
    half = weights.einsum(equation, jnp.asarray(x, jnp.bfloat16), leaf)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), product, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_table_of_the_vocabulary_is_looked_up_and_multiplied_with(tokens, monkeypatch):
    monkeypatch.setattr(quant_array, "BLOCK_BYTES", 4 * 16 * 7)
    _, leaf = _leaf((24, 16), (1,))
    exact = np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
    ids = jnp.array([[3, 99, 0]], jnp.int32)
    rows = weights.take(leaf, ids, dtype="float32")
    np.testing.assert_allclose(rows, exact[[[3, 23, 0]]], rtol=1e-6)
    x = np.random.default_rng(1).standard_normal((1, tokens, 16)).astype(np.float32)
    head = Head(weight=leaf, bias=None, vocab_size=20, softcap=None)
    found = jax.jit(logits)(x, head)
    np.testing.assert_allclose(found[:, :, :20], np.einsum("BTD,VD->BTV", x, exact)[:, :, :20], rtol=1e-5, atol=1e-5)
    assert (np.asarray(found[:, :, 20:]) == -np.inf).all()


def test_a_prime_number_of_rows_takes_few_blocks(monkeypatch):
    monkeypatch.setattr(quant_array, "BLOCK_BYTES", 4 * 16 * 7)
    assert quant_array._block(24, 4 * 16) == 6 and quant_array._block(23, 4 * 16) == 7
    _, leaf = _leaf((23, 16), (1,))
    exact = np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
    x = np.random.default_rng(1).standard_normal((1, 2, 16)).astype(np.float32)
    expected = np.einsum("BTD,VD->BTV", x, exact)
    np.testing.assert_allclose(jax.jit(leaf.against_rows)(x), expected, rtol=1e-5, atol=1e-5)
    _, leaf = _leaf((23, 16), (0,))
    exact = np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
    x = np.random.default_rng(1).standard_normal((1, 2, 23)).astype(np.float32)
    found = jax.jit(lambda x: weights.einsum("BTD,DF->BTF", x, leaf))(x)
    np.testing.assert_allclose(found, x @ exact, rtol=1e-5, atol=1e-5)


def test_experts_have_scales_of_their_own():
    _, leaf = _leaf((3, 4, 5), (1,))
    assert leaf.scale.shape == (3, 1, 5) and np.unique(leaf.scale).size == 15
    x = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    sizes = np.array([2, 0, 5], np.int32)
    exact = np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
    found = jax.jit(weights.ragged)(x, leaf, sizes)
    np.testing.assert_allclose(found, np.concatenate([x[:2] @ exact[0], x[2:] @ exact[2]]), rtol=1e-5, atol=1e-5)


def test_a_layer_cut_out_of_its_stack_keeps_the_axes_that_it_has():
    _, leaf = _leaf((2, 4, 6), (1,))
    leaf = QuantArray(leaf.values, leaf.scale, ("layers", "embed", "mlp"))
    layer = jax.tree.map(lambda part: part[1], leaf)
    assert (layer.shape, layer.axes) == ((4, 6), ("embed", "mlp")) and leaf.axes == ("layers", "embed", "mlp")


@pytest.mark.parametrize("name", cases.CASES)
def test_every_matrix_is_quantized_and_nothing_else(name):
    specs = tree.flatten(cases.model(name).specs())
    dims = choice.dims(specs)
    kept = {path.rpartition("/")[2] for path in specs.keys() - dims.keys()}
    assert kept <= {"scale", "bias", "table", "positions"} | {f"{x}_bias" for x in ("q", "k", "v", "o", "up", "down")}
    for path, found in dims.items():
        summed = {specs[path].axes[dim] for dim in found}
        last = path.rpartition("/")[2]
        assert summed == {"o": {"heads", "head"}, "down": {"mlp"}}.get(last, {"embed"}), path
    assert ParamSpec((4,), "float32", ("norm",), "x").kind != "int8"
