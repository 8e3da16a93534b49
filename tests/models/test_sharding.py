"""The same loss and gradients of a model on every mesh, from parameters that are really sharded. The train step as a
whole has its own matrix (tests/training); this one stops at the model, so that a difference is found where it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from t5x_like.core import tree
from t5x_like.core.types import ArraySpec
from t5x_like.parallel.pipeline import PipelineConfig
from t5x_like.parallel.rules import MESH_AXES
from t5x_like.parallel.sharding import batch_shardings, tree_shardings
from tests.models import cases

FAST = {"xla_backend_optimization_level": 0}
ROWS, LENGTH = 8, 16
MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp2_sequence2_tensor2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "tensor8": {"tensor": 8},
}


def make_mesh(sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


CASES = {"local_and_global": {"kv_heads": 8}, "t5_gated": {"kv_heads": 8}}
ENCODER = {"kv_heads": 8, "architecture": "encoder", "layers": 4}


@functools.cache
def one_device(case):
    """The model, its parameters and batch, and what one device makes of them."""
    sizes = {"heads": 8, "head_size": 4, "mlp": 64, "vocab_size": 250, "tied": True}
    if case == "encoder":
        model = cases.model("t5_gated", **sizes, **ENCODER)
        model = dataclasses.replace(model, pipeline=PipelineConfig(micro_batches=4, repeats=2))
    else:
        model = cases.model(case, **sizes, **CASES[case])
    params = cases.random_params(model)
    batch = packed("", 11) | {"inputs": cases.tokens(model, ROWS, LENGTH)}
    if "encoder_inputs" in model.inputs:
        batch |= packed("encoder_", 6) | {"encoder_inputs": cases.tokens(model, ROWS, LENGTH, seed=1)}
    arrays = {name: np.asarray(value, np.int32) for name, value in batch.items()}
    return model, params, arrays, run(model, params, batch)


def packed(prefix, first):
    """Two documents a row, the first of `first` tokens."""
    segments = np.where(np.arange(LENGTH) < first, 1, 2)[None, :].repeat(ROWS, 0)
    positions = np.where(segments == 1, np.arange(LENGTH), np.arange(LENGTH) - first)
    return {f"{prefix}segment_ids": segments, f"{prefix}positions": positions}


def run(model, params, batch, out_shardings=None):
    goal = jnp.asarray(np.random.default_rng(5).standard_normal((ROWS, LENGTH, model.config.width)), jnp.float32)

    def loss(params, batch):
        return jnp.square(model.apply(params, batch).hidden_BTD - goal).mean()

    shardings = None if out_shardings is None else (None, out_shardings)
    return jax.jit(jax.value_and_grad(loss), compiler_options=FAST, out_shardings=shardings)(params, batch)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MESHES)
def test_loss_and_every_gradient_equal_those_of_one_device(case, name):
    _compare(one_device(case), MESHES[name])


def test_an_encoder_alone_in_stages_gives_them_too():
    """T5's, whose relative positions belong to no layer, with documents that do not see each other."""
    _compare(one_device("encoder"), {"stage": 2, "fsdp": 2, "tensor": 2})


def _compare(one, sizes):
    model, params, batch, (value, gradients) = one
    mesh = make_mesh(sizes)
    shardings = tree_shardings(mesh, model.rules, model.specs())
    placed = jax.tree.map(jax.device_put, params, shardings)
    specs = {key: ArraySpec(leaf.shape, "int32", ("batch", "length")) for key, leaf in batch.items()}
    rows = batch_shardings(mesh, model.rules, specs)
    placed_batch = {key: jax.device_put(leaf, rows[key]) for key, leaf in batch.items()}
    if set(sizes) != {"data"}:
        for path, leaf in tree.leaves(placed):
            assert "layers/mlp/up" not in path or not leaf.sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        other, others = run(model, placed, placed_batch, shardings)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    ours = tree.flatten(others)
    for path, expected in tree.leaves(gradients):
        assert cases.largest_difference(ours[path], expected) <= 1e-5, path


def test_initial_values_do_not_depend_on_the_mesh():
    model = cases.model("llama_grouped_tied")
    shardings = tree_shardings(make_mesh({"fsdp": 4, "tensor": 2}), model.rules, model.specs())
    here = jax.jit(model.init, compiler_options=FAST)(jax.random.key(0))
    there = jax.jit(model.init, out_shardings=shardings, compiler_options=FAST)(jax.random.key(0))
    assert not there["layers"]["mlp"]["up"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, here, there)
