"""The train state: what a step changes, as one dict of trees, and where each of its leaves lies on the mesh.

    params     trainable parameters (fp32 master weights)
    optimizer  the optimizer's state
    ema        running average of `params`, present only if on
    progress   step (updates tried), skipped (updates refused) and the running statistics of the loss

Parameters that are not trained are no part of it: they are the step's argument `frozen`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from t5x_like.core import tree
from t5x_like.core.types import Tree
from t5x_like.models.model import Model
from t5x_like.optim.optimizers import Optimizer
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import named, replicated, tree_shardings

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Abstract state and frozen parameters: shapes, dtypes and shardings, nothing allocated."""

    state: State
    frozen: dict[str, Any]
    axes: State  # logical axes of every leaf of `state`
    frozen_axes: dict[str, Any]  # and of `frozen`

    def shardings(self) -> State:
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def fresh(params: Tree, optimizer: Optimizer, *, ema: bool) -> State:
    """The state before the first update."""
    state: State = {"params": params, "optimizer": optimizer.init(params), "progress": fresh_progress()}
    return state | {"ema": jax.tree.map(jnp.copy, params)} if ema else state


def fresh_progress() -> dict[str, jax.Array]:
    return {
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        # Exponential mean and variance of the accepted losses, and how many went in: for spikes.
        "loss_mean": jnp.zeros((), jnp.float32),
        "loss_variance": jnp.zeros((), jnp.float32),
        "loss_count": jnp.zeros((), jnp.int32),
    }


def layout(optimizer: Optimizer, *, trainable: Tree, frozen: Tree, ema: bool, mesh: Mesh, rules: Rules) -> Layout:
    """Shapes, dtypes and shardings of the state for trees of specs; allocates nothing."""
    abstract_params = tree.map_with_path(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), trainable)
    shapes = jax.eval_shape(lambda params: fresh(params, optimizer, ema=ema), abstract_params)
    param_axes = tree.map_with_path(lambda _, spec: spec.axes, trainable)
    axes: State = {
        "params": param_axes,
        "optimizer": optimizer.state_axes(trainable),
        "progress": jax.tree.map(lambda _: (), shapes["progress"]),
    }
    if ema:
        axes["ema"] = param_axes

    def placed(leaf: jax.ShapeDtypeStruct, leaf_axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = named(mesh, rules, leaf_axes, leaf.shape) if leaf_axes else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, shapes, axes)
    base = _abstract(frozen, tree_shardings(mesh, rules, frozen))
    base_axes = tree.map_with_path(lambda _, spec: spec.axes, frozen)
    return Layout(state, {"base": base}, axes, {"base": base_axes})


def initialize(model: Model, optimizer: Optimizer, key: jax.Array, layout: Layout) -> tuple[State, dict[str, Any]]:
    """A fresh state and the frozen parameters, each leaf made where it will lie."""
    base_paths = tree.flatten(layout.frozen["base"]).keys()
    frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, layout.frozen)

    def make(key: jax.Array) -> tuple[State, dict[str, Any]]:
        base, params = tree.split(model.init(key), lambda path: path in base_paths)
        return fresh(params, optimizer, ema="ema" in layout.state), {"base": base}

    return jax.jit(make, out_shardings=(layout.shardings(), frozen_shardings))(key)


def _abstract(specs: Tree, shardings: dict[str, NamedSharding]) -> dict[str, Any]:
    return tree.map_with_path(
        lambda _, spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding), specs, shardings
    )
