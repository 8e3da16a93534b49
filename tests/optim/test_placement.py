"""Optimizer state on a mesh: made, updated and kept where its parameter lies."""

import jax
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from t5x_like.optim.optimizers import OPTIMIZERS, build
from t5x_like.parallel.mesh import MeshConfig, make
from t5x_like.parallel.rules import rules
from t5x_like.parallel.sharding import tree_shardings

SPECS = {
    "embed": {"tokens": ParamSpec((16, 8), "float32", ("vocab", "embed"), "")},
    "layers": {
        "q": ParamSpec((2, 8, 4, 4), "float32", ("layers", "embed", "heads", "head"), ""),
        "norm": ParamSpec((2, 8), "float32", ("layers", "norm"), ""),
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharded_updates_equal_those_of_one_device_and_state_follows_its_parameter(config, name):
    mesh = make(MeshConfig("fsdp_tensor", "", None, None, None, 4, None, None, 2))
    section = config({"name": name, "adafactor.min_dim_size_to_factor": 4, "weight_decay": 0.1})
    optimizer = build(section, specs=SPECS, total_steps=4)
    rng = np.random.default_rng(0)
    params, grads = (
        tree.map_with_path(lambda _, spec: rng.normal(size=spec.shape).astype(np.float32), SPECS) for _ in range(2)
    )

    def two_updates(params, grads):
        state = optimizer.init(params)
        for step in range(2):
            updates, state = optimizer.update(grads, state, params, step)
        return updates, state

    expected = jax.jit(two_updates)(params, grads)
    of_params = tree_shardings(mesh, rules(), SPECS)
    of_state = tree_shardings(mesh, rules(), optimizer.state_specs())
    placed = jax.device_put((params, grads), (of_params, of_params))
    with jax.set_mesh(mesh):  # Muon spreads the layers over it
        updates, state = jax.jit(two_updates, out_shardings=(of_params, of_state))(*placed)
        program = str(jax.make_jaxpr(two_updates)(*placed))
    assert ("sharding_constraint" in program) == (name == "muon")
    assert not updates["layers"]["q"].sharding.is_fully_replicated
    for one, other in zip(jax.tree.leaves((updates, state)), jax.tree.leaves(expected), strict=True):
        # Sums over shards are taken in another order; five Newton-Schulz steps amplify the difference.
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * np.abs(other).max())
    flat, specs = tree.flatten(state), tree.flatten(SPECS)
    followers = [path for path in flat if path != "count" and flat[path].shape == specs[path.partition("/")[2]].shape]
    assert followers or name == "adafactor"
    for path in followers:
        parameter = updates_at(updates, path.partition("/")[2])
        assert flat[path].sharding.is_equivalent_to(parameter.sharding, parameter.ndim), path


def updates_at(updates: dict, path: str) -> jax.Array:
    return tree.flatten(updates)[path]
