"""Clipping by the global norm: against torch, and on sharded gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.optim.clip import clip_by_global_norm


def gradients(step: int) -> dict:
    rng = np.random.default_rng(step)
    scale = 10.0 ** rng.uniform(-2, 2)
    return {"a": {"w": np.float32(scale * rng.normal(size=(4, 6)))}, "b": np.float32(scale * rng.normal(size=7))}


def test_clipping_equals_torch_over_20_steps():
    clipped_steps = 0
    for step in range(20):
        grads = gradients(step)
        parameters = [torch.nn.Parameter(torch.zeros(leaf.shape)) for leaf in jax.tree.leaves(grads)]
        for parameter, grad in zip(parameters, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(grad)
        their_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        clipped, norm = clip_by_global_norm(jax.tree.map(jnp.asarray, grads), 1.0)
        np.testing.assert_allclose(norm, their_norm.numpy(), rtol=1e-6)
        for leaf, parameter in zip(jax.tree.leaves(clipped), parameters, strict=True):
            np.testing.assert_allclose(leaf, parameter.grad.numpy(), rtol=1e-6)
        clipped_steps += float(norm) > 1.0
    assert 3 < clipped_steps < 17


@pytest.mark.parametrize("limit", [None, 0, 0.0])
def test_no_limit_changes_nothing_and_still_reports_the_norm(limit):
    grads = {"a": jnp.array([30.0, 40.0])}
    clipped, norm = clip_by_global_norm(grads, limit)
    assert clipped["a"] is grads["a"] and float(norm) == 50.0


def test_norm_of_half_precision_gradients_is_summed_in_fp32():
    grads = {"a": jnp.ones(4096, jnp.bfloat16)}  # a bf16 sum of ones stops at 256
    clipped, norm = clip_by_global_norm(grads, 32.0)
    assert norm.dtype == jnp.float32 and float(norm) == 64.0
    assert clipped["a"].dtype == jnp.bfloat16 and float(clipped["a"][0]) == 0.5


def test_sharded_gradients_are_clipped_as_whole_ones():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    grads = {"w": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones(4)}
    placed = {
        "w": jax.device_put(grads["w"], NamedSharding(mesh, PartitionSpec("data"))),
        "b": jax.device_put(grads["b"], NamedSharding(mesh, PartitionSpec())),
    }
    whole, norm = clip_by_global_norm(grads, 1.0)
    sharded, sharded_norm = jax.jit(clip_by_global_norm, static_argnums=1)(placed, 1.0)
    assert sharded["w"].sharding.spec == PartitionSpec("data")
    np.testing.assert_allclose(sharded_norm, norm, rtol=1e-6)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), sharded, whole)
