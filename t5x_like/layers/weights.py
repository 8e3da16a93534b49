"""The three contractions of layers with weights: `einsum`, `take`, `ragged`.

A weight is a leaf of the parameter tree: an array, or a value that knows its own contractions (core.types.Leaf), such
as a quantized or a low-rank weight; this is the one place that tells them apart. Elsewhere a layer meets only vectors,
as plain arrays by `value` (scales of norms, biases), and the scorer meets the head by `dense`. Products of activations
(attention, gates) and shardings are NOT here.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int

from t5x_like.core import tree
from t5x_like.core.types import Leaf, RandomLeaf, Tree
from t5x_like.layers.param import fold


def value(w: Any) -> Any:
    """The leaf itself, whether it is held by a module (nnx.Param) or comes straight from the tree."""
    return w.get_value() if isinstance(w, nnx.Variable) else w


def einsum(equation: str, x: Float[Array, "..."], w: Any) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, w)` in the type of x: the float32 master is rounded at use, so its gradient is float32.

    Equations read "kept contracted, contracted new -> kept new", such as "BTNH,NHD->BTD". The product has the type of x
    (the hardware accumulates in float32).
    """
    kept, new = parse(equation)
    leaf = value(w)
    if isinstance(leaf, Leaf):
        return leaf.contract(equation, x)
    w = _array(leaf).astype(x.dtype)
    if get_abstract_mesh().size > 1:  # merged dims could not be sharded one by one
        return jnp.einsum(equation, x, w, preferred_element_type=x.dtype)
    # On one device as a plain matrix product: XLA's CPU compiler writes out a transposed copy of the cotangent when the
    # gradient of w contracts two dims (a quarter of the time of a training step).
    contracted = w.ndim - new
    kept_shape, new_shape = x.shape[:kept], w.shape[contracted:]
    size = math.prod(w.shape[:contracted])
    product = jnp.matmul(x.reshape(-1, size), w.reshape(size, -1), preferred_element_type=x.dtype)
    return product.reshape(kept_shape + new_shape)


def parse(equation: str) -> tuple[int, int]:
    """(dims of x that are kept, dims of w that are new). Raises ValueError for an equation of another form."""
    match = re.fullmatch(r"([A-Z]*),([A-Z]+)->([A-Z]*)", equation)
    if match:
        letters_x, letters_w, output = match.groups()
        contracted = sum(letter in letters_x for letter in letters_w)
        kept, new = letters_x[: len(letters_x) - contracted], letters_w[contracted:]
        fits = letters_x == kept + letters_w[:contracted] and output == kept + new
        if fits and contracted and len({*output, *letters_x}) == len(output) + contracted:
            return len(kept), len(new)
    raise ValueError(f'equation {equation!r}: expected "kept contracted, contracted new -> kept new", as "BTD,DF->BTF"')


def take(w: Any, ids: Int[Array, "..."], *, dtype: str) -> Float[Array, "..."]:
    """Rows of a [V, D] weight by number, in `dtype`. Numbers past the end give the last row, as on every platform.

    The gradient of a row is the sum over all its uses, always added up in float32: in bfloat16 a sum stops growing at
    256 times what is added to it, so a frequent token would lose most of its gradient.
    """
    leaf = value(w)
    if isinstance(leaf, Leaf):
        return leaf.rows(ids, dtype)
    table = _array(leaf)
    if table.dtype == jnp.dtype(dtype) == jnp.float32:
        return _rows(table, ids)
    return _rounded_rows((table.shape, table.dtype), dtype, table, ids)


def _rows(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    return table_VD.at[ids].get(mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_rows(stored: tuple[tuple[int, ...], Any], dtype: str, table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """stored: shape and type of the table. Rounded first: what a mesh exchanges is then the smaller type."""
    return _rows(table_VD.astype(dtype), ids)


def _rounded_rows_forward(stored, dtype, table_VD, ids):
    return _rounded_rows(stored, dtype, table_VD, ids), ids


def _rounded_rows_backward(stored, dtype, ids, g):
    shape, stored_dtype = stored
    g_VD = jnp.zeros(shape, jnp.float32).at[ids].add(g.astype(jnp.float32), mode="clip")
    return g_VD.astype(stored_dtype), None


_rounded_rows.defvjp(_rounded_rows_forward, _rounded_rows_backward)


def ragged(x_MD: Float[Array, "M D"], w_EDF: Any, sizes_E: Int[Array, " E"]) -> Float[Array, "M F"]:
    """Rows of x in groups, the first sizes[0] of them times w[0], and so on (experts), in the type of x."""
    leaf = value(w_EDF)
    if isinstance(leaf, Leaf):
        return leaf.ragged(x_MD, sizes_E)
    return jax.lax.ragged_dot(x_MD, _array(leaf).astype(x_MD.dtype), sizes_E)


def keyed(params: Tree, key: jax.Array) -> dict[str, Any]:
    """The parameters of one call in training: each leaf that draws random numbers gets a key by its path."""

    def of_leaf(path: str, leaf: Any) -> Any:
        return leaf.with_key(fold(key, path)) if isinstance(leaf, RandomLeaf) else leaf

    return tree.map_with_path(of_leaf, params)


def dense(w: Any, dtype: Any) -> Any:
    """The weight as one array: an array as it is stored, any other leaf written out in `dtype`. For the head alone,
    whose scorer cuts and gathers it."""
    leaf = value(w)
    return leaf.dense(dtype) if isinstance(leaf, Leaf) else leaf


def against_rows(x_BTD: Float[Array, "B T D"], w: Any) -> Float[Array, "B T V"] | None:
    """Float32 products of x with each row of a [V, D] leaf that multiplies so itself (`against_rows`), without writing
    itself out as `dense` does; None for an array and any other leaf."""
    multiply = getattr(value(w), "against_rows", None)
    return None if multiply is None else multiply(x_BTD)


def _array(leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array):
        raise TypeError(f"a weight of type {type(leaf).__name__} is no leaf that contractions know")
    return leaf
