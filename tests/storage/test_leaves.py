"""Trees as named arrays and back: optimizer states, weights that are no plain arrays, and names that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_like.core.errors import UserError
from t5x_like.storage import leaves
from tests.storage.quantized import CONSTRUCTORS, Quantized


def test_an_optimizer_state_comes_back_with_its_types():
    params = {"layers": {"up": jnp.ones((2, 3))}, "norm": jnp.ones(3)}
    state = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    flat = leaves.array_paths(state)
    assert "1/0/mu/layers/up" in flat and "1/0/count" in flat
    again = leaves.rebuild(state, flat)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert again[1][0].mu["layers"]["up"] is state[1][0].mu["layers"]["up"]


def test_a_special_leaf_becomes_its_parts_and_is_recorded():
    weight = Quantized(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)), ("embed", "mlp"))
    tree = {"layers": {"up": weight, "norm": jnp.ones(4)}}
    assert set(leaves.array_paths(tree)) == {"layers/up/values", "layers/up/scales", "layers/norm"}
    assert leaves.kinds(tree) == {"layers/up": {"kind": "quantized", "shape": [4, 2], "axes": ["embed", "mlp"]}}


def test_templates_are_built_from_the_record_alone():
    weight = Quantized(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)), ("embed", "mlp"))
    tree = {"layers": {"up": weight, "norm": jnp.ones(4, jnp.bfloat16)}}
    record = {
        path: {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name}
        for path, array in leaves.array_paths(tree).items()
    }
    built = leaves.templates(record, leaves.kinds(tree), CONSTRUCTORS, sharding=lambda path, shape: None, where="here")
    assert jax.tree.structure(built) == jax.tree.structure(tree)
    assert built["layers"]["up"].values.dtype == jnp.int8 and built["layers"]["norm"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match="here: 'layers/up' is of the kind 'quantized'.*known: array"):
        leaves.templates(record, leaves.kinds(tree), {}, sharding=lambda path, shape: None, where="here")


@pytest.mark.parametrize("name", ["a/b", "a.b", ""])
def test_a_name_that_could_be_two_is_refused(name):
    with pytest.raises(ValueError, match="no name for a part"):
        leaves.array_paths({name: jnp.ones(1)})
