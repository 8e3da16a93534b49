"""Parameters are declared without being allocated and drawn from keys that belong to their paths."""

import jax
import numpy as np
import pytest
from flax import nnx

from t5x_like.core.types import ParamSpec
from t5x_like.layers import param


class Wide(nnx.Module):
    def __init__(self):
        self.weight = param.param((10**6, 10**7), axes=("embed", "mlp"), init=param.normal(0.02))


class Outer(nnx.Module):
    def __init__(self):
        self.inner = Wide()
        self.scale = param.param((3,), axes=("norm",), init=param.ONES)


def test_declaring_ten_terabytes_allocates_nothing():
    _, specs = param.declare(Outer, dtype="float32")
    assert specs == {
        "inner": {"weight": ParamSpec((10**6, 10**7), "float32", ("embed", "mlp"), "normal(0.02)")},
        "scale": ParamSpec((3,), "float32", ("norm",), "constant(1)"),
    }


def test_parameters_in_a_list_are_refused():
    class Listed(nnx.Module):
        def __init__(self):
            self.parts = nnx.List([Wide()])

    with pytest.raises(TypeError, match="keep parameters in named attributes"):
        param.declare(Listed, dtype="float32")


def draw(specs, seed=0):
    return param.initialize(specs, jax.random.key(seed))


def spec(*shape, init="normal(2)"):
    return ParamSpec(shape, "float32", (None,) * len(shape), init)


def test_adding_a_parameter_changes_no_other():
    few, more = {"b": spec(4)}, {"a": spec(4), "b": spec(4), "c": {"b": spec(4)}}
    np.testing.assert_array_equal(draw(few)["b"], draw(more)["b"])
    assert not np.array_equal(draw(more)["b"], draw(more)["c"]["b"])
    assert not np.array_equal(draw(few)["b"], draw(few, seed=1)["b"])


def test_a_deeper_stack_begins_with_the_same_layers():
    one = {"w": spec(5, 7)}
    few, more = draw(param.stacked(one, 2))["w"], draw(param.stacked(one, 6))["w"]
    np.testing.assert_array_equal(few, more[:2])
    assert not np.array_equal(more[0], more[1])


def test_initializers_have_the_named_moments():
    values = np.asarray(draw({"w": spec(200, 300)})["w"])
    assert abs(values.mean()) < 0.05 and abs(values.std() - 2.0) < 0.02
    np.testing.assert_array_equal(draw({"w": spec(3, init=param.ONES)})["w"], np.ones(3))


def test_an_unknown_initializer_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'normal'"):
        draw({"w": spec(3, init="norml(1)")})
