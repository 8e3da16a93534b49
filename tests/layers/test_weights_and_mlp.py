"""Contractions with weights, and the feed-forward layer, against plain numpy and torch-free formulas."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_like.core.types import Leaf
from t5x_like.layers import param, weights
from t5x_like.layers.mlp import ACTIVATIONS, Mlp, add_bias
from tests.layers.leaves import LowRank, Scaled

EQUATIONS = {
    "BTD,DF->BTF": ((2, 3, 4), (4, 5)),
    "BTD,DNH->BTNH": ((2, 3, 4), (4, 2, 3)),
    "BTNH,NHD->BTD": ((2, 3, 2, 3), (2, 3, 4)),
}


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("devices", [1, 2])
def test_einsum_is_einsum_with_and_without_a_mesh(equation, devices):
    shapes = EQUATIONS[equation]
    x, w = (random(i, *shape) for i, shape in enumerate(shapes))
    with jax.set_mesh(Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))):
        out = jax.jit(lambda x, w: weights.einsum(equation, x, w))(x, w)
    np.testing.assert_allclose(out, np.einsum(equation, x, w), rtol=1e-5, atol=1e-5)


def test_products_have_the_type_of_activations_and_gradients_that_of_the_weight():
    x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
    assert weights.einsum("BD,DF->BF", x, w).dtype == jnp.bfloat16
    assert weights.take(w, jnp.array([1]), dtype="bfloat16").dtype == jnp.bfloat16

    def loss(w):
        rows = weights.take(w, jnp.array([1, 1]), dtype="bfloat16")
        return weights.einsum("BD,DF->BF", x, w).astype(jnp.float32).sum() + rows.astype(jnp.float32).sum()

    assert jax.eval_shape(jax.grad(loss), w).dtype == jnp.float32


def frequent(rows=8, length=1024):
    """Ids of which more than 5000 are 3, the gradient of each row of a [16, 4] table's use, and its sum for each id."""
    generator = np.random.default_rng(0)
    ids = np.where(generator.random((rows, length)) < 0.7, 3, generator.integers(0, 16, (rows, length)))
    g = jnp.asarray(1 + generator.random((rows, length, 4)), jnp.bfloat16)
    expected = np.zeros((16, 4))
    np.add.at(expected, ids, np.asarray(g, np.float64))
    assert (ids == 3).sum() > 5000
    return jnp.asarray(ids, jnp.int32), g, expected


def pulled_back(table, ids, g):
    return jax.vjp(lambda table: weights.take(table, ids, dtype="bfloat16"), table)[1](g)[0]


def test_a_frequent_token_keeps_its_whole_gradient_in_bfloat16():
    ids, g, expected = frequent()
    table = random(0, 16, 4)
    np.testing.assert_allclose(jax.jit(pulled_back)(table, ids, g), expected, rtol=1e-5)

    def each(carry, row):
        return carry + pulled_back(table, *row), None

    # Row by row, as micro-batches are; and all rows side by side.
    scanned, _ = jax.jit(lambda ids, g: jax.lax.scan(each, jnp.zeros((16, 4)), (ids, g)))(ids, g)
    np.testing.assert_allclose(scanned, expected, rtol=1e-5)
    mapped = jax.jit(jax.vmap(pulled_back, (None, 0, 0)))(table, ids, g)
    np.testing.assert_allclose(mapped.sum(axis=0), expected, rtol=1e-5)


def test_on_a_mesh_a_frequent_token_keeps_its_gradient_and_the_lookup_reads_the_rounded_table():
    ids, g, expected = frequent()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ([("data", "fsdp")], ["tensor", "fsdp"]))

    def both(table, ids, g):
        return weights.take(table, ids, dtype="bfloat16"), pulled_back(table, ids, g)

    arrays = jax.device_put(random(0, 16, 4), parts), jax.device_put(ids, rows), jax.device_put(g, rows)
    with jax.set_mesh(mesh):
        lowered = jax.jit(both, out_shardings=(rows, parts)).lower(*arrays)
        out, gradient = lowered.compile()(*arrays)
    np.testing.assert_array_equal(out, jnp.asarray(arrays[0], jnp.bfloat16)[np.asarray(ids)])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    # So that a mesh which gathers the table does so in half the bytes. The compiled text would not show it: the CPU's
    # compiler moves 16-bit numbers as float32.
    tables = re.findall(r"stablehlo\.gather.*: \(tensor<(\w+)>", lowered.as_text())
    assert tables and set(tables) == {"16x4xbf16"}


def test_without_rounding_a_lookup_is_a_plain_lookup():
    table, ids = random(0, 16, 4), jnp.array([[1, 20, 3]], jnp.int32)

    def text(function):
        return str(jax.make_jaxpr(jax.value_and_grad(lambda table: jnp.square(function(table)).sum()))(table))

    plain = text(lambda table: table.at[ids].get(mode="clip"))
    assert text(lambda table: weights.take(table, ids, dtype="float32")) == plain
    assert text(lambda table: weights.take(table, ids, dtype="bfloat16").astype(jnp.float32)) != plain


def test_the_gradient_of_a_bias_is_summed_over_tokens_in_float32():
    _, g, _ = frequent()
    x = jnp.zeros(g.shape, jnp.bfloat16)
    gradient = jax.jit(lambda bias: jax.vjp(lambda bias: add_bias(x, nnx.Param(bias)), bias)[1](g)[0])(jnp.ones(4))
    np.testing.assert_allclose(gradient, np.asarray(g, np.float64).sum(axis=(0, 1)), rtol=1e-5)


def test_ragged_multiplies_each_group_with_its_own_weight():
    x, w = random(0, 5, 3), random(1, 3, 3, 4)
    out = jax.jit(weights.ragged)(x, w, jnp.array([2, 0, 3], jnp.int32))
    np.testing.assert_allclose(out, np.concatenate([x[:2] @ w[0], x[2:] @ w[2]]), rtol=1e-5, atol=1e-5)


def test_a_leaf_of_unknown_kind_is_refused():
    with pytest.raises(TypeError, match="ndarray is no leaf that contractions know"):
        weights.einsum("BD,DF->BF", jnp.ones((1, 2)), np.ones((2, 2)))


def low_rank(seed, first, *rest):
    generator = np.random.default_rng(seed)
    base, a, b = (generator.standard_normal(shape) for shape in ((first, *rest), (first, 2), (2, *rest)))
    return LowRank(*(jnp.asarray(part, jnp.float32) for part in (base, a, b)))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_leaf_multiplies_by_its_own_rules(devices):
    w, table = low_rank(0, 4, 2, 3), low_rank(1, 16, 4)
    ids, x = jnp.array([[3, 1], [4, 15]], jnp.int32), random(2, 2, 3, 4)
    assert isinstance(w, Leaf)
    with jax.set_mesh(Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))):
        product = jax.jit(lambda x, w: weights.einsum("BTD,DNH->BTNH", x, w))(x, w)
        rows = jax.jit(lambda ids, w: weights.take(w, ids, dtype="float32"))(ids, table)
    assert np.abs(product - np.einsum("BTD,DNH->BTNH", x, w.base)).max() > 0.1
    np.testing.assert_allclose(product, np.einsum("BTD,DNH->BTNH", x, w.dense("float32")), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows, np.asarray(table.dense("float32"))[ids], rtol=1e-4, atol=1e-5)
    scaled = Scaled(jnp.arange(24, dtype=jnp.int8).reshape(2, 3, 4) - 9, jnp.full((2, 1, 4), 0.5))
    grouped = weights.ragged(random(3, 5, 3), scaled, jnp.array([2, 3], jnp.int32))
    dense = np.asarray(scaled.dense("float32"))
    x = random(3, 5, 3)
    np.testing.assert_allclose(grouped, np.concatenate([x[:2] @ dense[0], x[2:] @ dense[1]]), rtol=1e-4, atol=1e-5)


def test_a_quantized_weight_serves_a_layer_that_is_not_told():
    settings = {"embed": 4, "mlp": 6, "activation": "silu", "gated": True, "bias": False}
    graphdef, specs = param.declare(lambda: Mlp(**settings, init="normal(1)", init_down="normal(1)"), dtype="float32")
    generator = np.random.default_rng(0)
    leaves = {
        name: Scaled(
            jnp.asarray(generator.integers(-127, 128, spec.shape), jnp.int8),
            jnp.asarray(generator.random((1, spec.shape[1])) / 127, jnp.float32),
        )
        for name, spec in specs.items()
    }
    x = random(0, 2, 3, 4)
    run = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))
    dense = run({name: leaf.dense("float32") for name, leaf in leaves.items()}, x)
    assert np.abs(dense).max() > 0.1
    np.testing.assert_allclose(run(leaves, x), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("equation", ["BTD,DF->BFT", "BTD,FD->BTF", "BTD,DF->BT", "BTD,EF->BTDEF", "BTD,DF"])
def test_an_equation_of_another_form_is_refused_on_every_mesh(equation, devices):
    x, w = jnp.ones((2, 3, 4)), jnp.ones((4, 4))
    with jax.set_mesh(Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))):
        with pytest.raises(ValueError, match="kept contracted, contracted new"):
            jax.jit(lambda x, w: weights.einsum(equation, x, w)).lower(x, w)


FORMULAS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def test_activations_are_their_formulas():
    assert FORMULAS.keys() == ACTIVATIONS.keys()
    x = np.linspace(-4, 4, 41)
    for name, formula in FORMULAS.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), formula(x), atol=2e-6, err_msg=name)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_its_formula(gated, bias):
    settings = {"embed": 4, "mlp": 6, "activation": "relu2", "gated": gated, "bias": bias}
    graphdef, specs = param.declare(lambda: Mlp(**settings, init="normal(1)", init_down="normal(1)"), dtype="float32")
    generator = np.random.default_rng(0)
    p = {name: generator.standard_normal(spec.shape).astype(np.float32) for name, spec in specs.items()}
    x = generator.standard_normal((2, 3, 4)).astype(np.float32)
    zero = np.zeros(())
    hidden = x @ p["up"] + p.get("up_bias", zero)
    if gated:
        hidden = FORMULAS["relu2"](x @ p["gate"] + p.get("gate_bias", zero)) * hidden
    else:
        hidden = FORMULAS["relu2"](hidden)
    out = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(p, x)
    np.testing.assert_allclose(out, hidden @ p["down"] + p.get("down_bias", zero), rtol=1e-4, atol=1e-4)
