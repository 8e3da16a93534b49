"""What a run holds before its first step: drawn, taken from another run, or read as a frozen role."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.types import ParamSpec
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as tables
from t5x_like.storage.base import restore_whole
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.training import state as train_state
from tests.training.test_step import sgd

RULES = tables.rules()
TRAINED = {
    "w": ParamSpec((8, 16), "float32", ("embed", "mlp"), "normal(1.0)"),
    "head": ParamSpec((8, 4), "float32", ("embed", None), "normal(1.0)"),
}
BASE = {"embed": {"tokens": ParamSpec((16, 8), "float32", ("vocab", "embed"), "normal(1.0)")}}
# Where these are drawn, drawing fails: no such initializer is known.
NEVER_DRAWN = {"tokens": ParamSpec((16, 8), "float32", ("vocab", "embed"), "read_only(0)")}


def build(frozen, trained=TRAINED):
    parts = train_state.Parts(trained, RULES, frozen)
    mesh = meshes.make(meshes.MeshConfig("fsdp", "", *(None,) * 7))
    optimizer = sgd(specs=trained)
    return parts, optimizer, train_state.layout(optimizer, parts, ema=True, mesh=mesh)


def base(specs=BASE, source=None):
    return {"base": train_state.Frozen(specs, RULES, source)}


def initialize(built, taken):
    parts, optimizer, layout = built
    return train_state.initialize(parts, optimizer, jax.random.key(0), layout, taken=taken)


def test_what_is_taken_is_not_drawn_and_the_rest_is_what_it_would_have_been():
    fresh, _ = initialize(build(base()), {})
    unknown = {path: dataclasses.replace(spec, init="read_only(0)") for path, spec in TRAINED.items()}
    built = build(base(), TRAINED | {"w": unknown["w"]})
    with pytest.raises(ValueError, match="read_only"):
        initialize(built, {})
    taken = jax.device_put(jnp.full((8, 16), 3.0), built[2].state["params"]["w"].sharding)
    state, frozen = initialize(built, {"w": taken})
    assert state["params"]["w"] is taken  # the very array: no copy, nothing beside it
    np.testing.assert_array_equal(state["params"]["head"], fresh["params"]["head"])
    np.testing.assert_array_equal(state["ema"]["w"], taken)
    assert frozen["base"]["embed"]["tokens"].shape == (16, 8)
    for path, leaf in tree.leaves(state):
        assert leaf.sharding.is_equivalent_to(tree.flatten(built[2].state)[path].sharding, leaf.ndim), path


def test_a_role_with_a_source_is_read_onto_its_own_places_and_never_drawn(tmp_path):
    teacher = {"tokens": jnp.arange(128.0).reshape(16, 8)}
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.save(1, {"params": teacher}, {}) and checkpoints.wait()
    source = train_state.Source(str(tmp_path / "1"), functools.partial(restore_whole, str(tmp_path / "1"), "params"))
    roles = base() | {"teacher": train_state.Frozen(NEVER_DRAWN, RULES, source)}
    built = build(roles)
    _, frozen = initialize(built, {})
    assert set(frozen) == {"base", "teacher"}
    np.testing.assert_array_equal(frozen["teacher"]["tokens"], teacher["tokens"])
    assert not frozen["teacher"]["tokens"].sharding.is_fully_replicated
