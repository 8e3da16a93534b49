"""From logical axes to shardings of arrays: parameters by their specs, activations by `constrain`.

The rules in force are a context that `Model.apply` enters itself; the mesh is the one of `jax.set_mesh`.
Which axis lies where is decided in `rules.py` alone.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from t5x_like.core import tree
from t5x_like.core.types import ArraySpec, Axes, Tree
from t5x_like.parallel.rules import Rules

_rules: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def current_rules() -> Rules:
    rules = _rules.get()
    if rules is None:
        raise RuntimeError("no rules in force: enter use_rules(...), as Model.apply does")
    return rules


def activation_spec(axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """Where an activation lies on the mesh in context, leaving out axes that an enclosing shard_map handles."""
    return current_rules().spec(axes, shape, free_axis_sizes())


def shards(axis: str, size: int) -> int:
    """Into how many parts the mesh in context cuts a dim of an activation with this logical axis and size."""
    if nothing_to_place():
        return 1
    sizes = free_axis_sizes()
    return math.prod(sizes[name] for name in spec_names(activation_spec((axis,), (size,))[0]))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the layout of an activation; the identity without a mesh and inside a shard_map over all axes."""
    if nothing_to_place():
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(axes, x.shape))


def nothing_to_place() -> bool:
    """Whether there is no mesh, one of a single device, or an enclosing shard_map over all axes."""
    mesh = get_abstract_mesh()
    return mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types) or mesh.size == 1


def free_axis_sizes() -> dict[str, int]:
    """The sizes of the axes of the mesh in context that no enclosing shard_map handles."""
    mesh = get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def spec_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def named(mesh: Mesh | AbstractMesh, rules: Rules, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, rules.spec(axes, shape, dict(mesh.shape)))


def tree_shardings(mesh: Mesh | AbstractMesh, rules: Rules, specs: Tree) -> dict[str, Any]:
    """The sharding of each parameter of a tree of specs (anything with `axes` and `shape`)."""
    return tree.map_with_path(lambda _, spec: named(mesh, rules, spec.axes, spec.shape), specs)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(
    mesh: Mesh | AbstractMesh, rules: Rules, specs: Mapping[str, ArraySpec]
) -> dict[str, NamedSharding]:
    """Where the arrays of a batch lie, by their declared axes."""
    return {name: named(mesh, rules, spec.axes, spec.shape) for name, spec in specs.items()}


def abstract_batch(
    mesh: Mesh | AbstractMesh, rules: Rules, specs: Mapping[str, ArraySpec]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch as a program is compiled for them: shape, dtype and sharding."""
    shardings = batch_shardings(mesh, rules, specs)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name]) for name, spec in specs.items()
    }


def device_bytes(arrays: Any) -> int:
    """Bytes of a tree of sharded arrays, or of their shapes, on one device; the padding of layouts is not counted."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * np.dtype(a.dtype).itemsize for a in leaves)


def addressable_rows(arrays: Mapping[str, jax.ShapeDtypeStruct]) -> np.ndarray:
    """The global rows (dim 0) of a batch that devices of this process need, ascending and without repetition."""
    rows = np.zeros(next(iter(arrays.values())).shape[0], bool)
    for array in arrays.values():
        for index in array.sharding.addressable_devices_indices_map(array.shape).values():
            rows[index[0] if index else slice(None)] = True
    return np.flatnonzero(rows)


def global_batch(
    read_rows: Callable[[np.ndarray], dict[str, np.ndarray]],
    *,
    rows: np.ndarray,
    arrays: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Sharded arrays of a whole batch, of which this process reads only `rows` (from `addressable_rows`).

    The sharding says which part each device takes; equal slices per process would be silently wrong where a
    model axis spans processes.
    """
    local = read_rows(rows)
    row_of = np.full(next(iter(arrays.values())).shape[0], -1)
    row_of[rows] = np.arange(len(rows))

    def part(values: np.ndarray, index: Any) -> np.ndarray:
        return values[(row_of[index[0]], *index[1:])]

    return {
        name: jax.make_array_from_callback(array.shape, array.sharding, functools.partial(part, local[name]))
        for name, array in arrays.items()
    }
