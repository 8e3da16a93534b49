"""How a module declares a parameter, and how declared parameters get their first values.

A declaration is shape, logical axes and the name of an initializer (normal with a stddev, uniform up to a bound, or a
constant); no array is
made until `initialize`, and modules draw no random numbers themselves. Shardings and the dtype of computation are NOT
here.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_like.core import tree
from t5x_like.core.config import nearest
from t5x_like.core.types import Axes, ParamSpec, Tree


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str, stddev: float) -> jax.Array:
    # Drawn in float32 whatever the storage type, so that the storage type only rounds.
    return (stddev * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: str, bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def _constant(key: jax.Array, shape: tuple[int, ...], dtype: str, value: float) -> jax.Array:
    del key
    return jnp.full(shape, value, dtype)


# What may stand in `ParamSpec.init`, as "name(number)".
INITIALIZERS: dict[str, Callable[[jax.Array, tuple[int, ...], str, float], jax.Array]] = {
    "normal": _normal,
    "uniform": _uniform,
    "constant": _constant,
}

ZEROS, ONES = "constant(0)", "constant(1)"


def normal(stddev: float) -> str:
    """The initializer's text for a standard deviation.

    >>> normal(0.02)
    'normal(0.02)'
    """
    return f"normal({stddev:.6g})"


def param(shape: tuple[int, ...], *, axes: Axes, init: str) -> nnx.Param:
    """A parameter of a module: one logical axis name for each dim, and an initializer such as "normal(0.02)".

    Only ever built under `jax.eval_shape` (see `declare`), so the zeros here are a shape and nothing else. The metadata
    must not be called `out_sharding`: flax applies that one eagerly.
    """
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, init=init)


def declare(build: Callable[[], nnx.Module], *, dtype: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graphdef, nested dict of ParamSpec) of a module; nothing is allocated.

    The axes are read here because the plain dict that `nnx.merge` takes back drops them.
    """
    graphdefs: list[nnx.GraphDef] = []

    def state() -> nnx.State:
        graphdef, state = nnx.split(build())
        graphdefs.append(graphdef)
        return state

    abstract = jax.eval_shape(state)
    flat: dict[str, ParamSpec] = {}
    for path, variable in nnx.to_flat_state(abstract):
        name = "/".join(_text(key) for key in path)
        flat[name] = ParamSpec(variable.get_value().shape, dtype, variable.axes, variable.init)
    return graphdefs[0], tree.unflatten(flat)


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"module attribute {key!r} is no name; keep parameters in named attributes, not in lists")
    return key


def stacked(specs: Tree, layers: int) -> dict[str, Any]:
    """The specs of `layers` equal layers stored as one array per weight, in layer order."""
    return tree.map_with_path(
        lambda _, spec: ParamSpec((layers, *spec.shape), spec.dtype, ("layers", *spec.axes), spec.init), specs
    )


def initialize(specs: Tree, key: jax.Array) -> dict[str, Any]:
    """First values of a tree of specs. Each leaf's key comes from its path alone: adding one changes no other.

    Stacked layers are one draw: threefry counts elements, so layer i is the same in any depth, and the program compiles
    in 40% of the time of a `vmap` over one key a layer.
    """
    return tree.map_with_path(lambda path, spec: _draw(spec, fold(key, path)), specs)


def empty(specs: Any) -> Any:
    """The arrays of any pytree of specs whose values are constants (a cache)."""
    return jax.tree.map(lambda spec: _draw(spec, jax.random.key(0)), specs)


def fold(key: jax.Array, name: str) -> jax.Array:
    """A key for one purpose."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    match = re.fullmatch(r"(\w+)\(([-+.\de]+)\)", spec.init)
    if match is None or match[1] not in INITIALIZERS:
        name = match[1] if match else spec.init
        raise ValueError(f"initializer {spec.init!r} is unknown; {nearest(name, INITIALIZERS)}")
    return INITIALIZERS[match[1]](key, spec.shape, spec.dtype, float(match[2]))
