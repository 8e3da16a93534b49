"""The train state: what a step changes, as one dict of trees, and where each of its leaves lies on the mesh.

    params     trainable parameters (fp32 master weights)
    optimizer  the optimizer's state
    ema        running average of `params`, present only if on
    progress   step (updates tried), skipped (updates refused) and the running statistics of the loss

Parameters that are not trained are no part of it: they are the step's argument `frozen`, trees by role. All of it
holds plain arrays by path.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from t5x_like.core import tree
from t5x_like.core.types import Tree
from t5x_like.layers import param
from t5x_like.optim.optimizers import Optimizer
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import named, replicated, tree_shardings

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where parameters are read from: `read(templates)` gives the tree, each leaf placed as its template says."""

    directory: str
    read: Callable[[Tree], Tree]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Parameters that a run reads and does not train; no `source`: they are drawn, taken or restored with the trained
    ones."""

    specs: Tree
    rules: Rules
    source: Source | None


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parameters of a run before they exist: specs of the trained ones, and the frozen ones by role.

    "base" are those of the trained model that are not trained.
    """

    trained: Tree
    rules: Rules
    frozen: Mapping[str, Frozen]


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


def layout(optimizer: Optimizer, parts: Parts, *, ema: bool, mesh: Mesh | AbstractMesh) -> Layout:
    """Shapes, dtypes and shardings of all that a run holds; allocates nothing."""
    trainable = parts.trained
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
        sharding = named(mesh, parts.rules, leaf_axes, leaf.shape) if leaf_axes else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, shapes, axes)
    frozen = {
        role: _abstract(part.specs, tree_shardings(mesh, part.rules, part.specs)) for role, part in parts.frozen.items()
    }
    frozen_axes = {
        role: tree.map_with_path(lambda _, spec: spec.axes, part.specs) for role, part in parts.frozen.items()
    }
    return Layout(state, frozen, axes, frozen_axes)


def initialize(
    parts: Parts, optimizer: Optimizer, key: jax.Array, layout: Layout, *, taken: Mapping[str, jax.Array]
) -> tuple[State, dict[str, Any]]:
    """A fresh state and the frozen parameters, each leaf made where it will lie.

    `taken` are parameters of the trained model, by path, that were read from another run; roles with a source are
    read here. Neither is ever drawn, so that no parameter is held twice.
    """
    base = parts.frozen["base"]
    specs = tree.flatten(parts.trained) | (tree.flatten(base.specs) if base.source is None else {})
    missing = {path: spec for path, spec in specs.items() if path not in taken}
    abstract = tree.flatten(layout.state["params"]) | tree.flatten(layout.frozen["base"])
    drawn = jax.jit(
        lambda key: param.initialize(tree.unflatten(missing), key),
        out_shardings=tree.unflatten({path: abstract[path].sharding for path in missing}),
    )(key)
    made = tree.flatten(drawn) | dict(taken)
    params = tree.map_with_path(lambda path, _: made[path], parts.trained)
    frozen = read_sources(parts, layout)
    if base.source is None:
        frozen["base"] = tree.map_with_path(lambda path, _: made[path], base.specs)
    return start(params, optimizer, layout), frozen


def start(params: Tree, optimizer: Optimizer, layout: Layout) -> State:
    """The state before the first update of parameters that lie where they shall."""
    shardings = {name: part for name, part in layout.shardings().items() if name != "params"}

    def rest(params: Tree) -> State:
        state = fresh(params, optimizer, ema="ema" in layout.state)
        return {name: state[name] for name in shardings}

    return {"params": params} | jax.jit(rest, out_shardings=shardings)(params)


def read_sources(parts: Parts, layout: Layout) -> dict[str, Any]:
    """The frozen parameters of every role that has a source, read where they shall lie."""
    return {
        role: part.source.read(layout.frozen[role]) for role, part in parts.frozen.items() if part.source is not None
    }


def _abstract(specs: Tree, shardings: dict[str, NamedSharding]) -> dict[str, Any]:
    return tree.map_with_path(
        lambda _, spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding), specs, shardings
    )
