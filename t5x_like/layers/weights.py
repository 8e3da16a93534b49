"""The three contractions of layers with weights: `einsum`, `take`, `ragged`.

A weight is a leaf of the parameter tree: an array now, later also quantized and low-rank values, which contractions
tell apart here. Elsewhere a layer meets only vectors, as plain arrays by `value` (scales of norms, biases), and the
scorer meets the head (scoring/head.py). It is NOT the place of activations' products (attention, gates) nor of
shardings.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Int


def value(w: Any) -> Any:
    """The leaf itself, whether it is held by a module (nnx.Param) or comes straight from the tree."""
    return w.get_value() if isinstance(w, nnx.Variable) else w


def einsum(equation: str, x: Float[Array, "..."], w: Any) -> Float[Array, "..."]:
    """`jnp.einsum(equation, x, w)` in the type of x: the float32 master is rounded at use, so its gradient is float32.

    Equations read "kept contracted, contracted new -> kept new", such as "BTNH,NHD->BTD". The product has the type of x
    (the hardware accumulates in float32).
    """
    w = _array(w).astype(x.dtype)
    if get_abstract_mesh().size > 1:  # merged dims could not be sharded one by one
        return jnp.einsum(equation, x, w, preferred_element_type=x.dtype)
    # On one device as a plain matrix product: XLA's CPU compiler writes out a transposed copy of the cotangent when the
    # gradient of w contracts two dims (a quarter of the time of a training step).
    inputs, output = equation.split("->")
    letters_x, letters_w = inputs.split(",")
    contracted = sum(letter in letters_x for letter in letters_w)
    kept_shape, new_shape = x.shape[: len(letters_x) - contracted], w.shape[contracted:]
    assert output == letters_x[: len(kept_shape)] + letters_w[contracted:], equation
    size = math.prod(w.shape[:contracted])
    product = jnp.matmul(x.reshape(-1, size), w.reshape(size, -1), preferred_element_type=x.dtype)
    return product.reshape(kept_shape + new_shape)


def take(w: Any, ids: Int[Array, "..."], *, dtype: str) -> Float[Array, "..."]:
    """Rows of a [V, D] weight by number, in `dtype`. Numbers past the end give the last row, as on every platform.

    The gradient of a row is the sum over all its uses, always added up in float32: in bfloat16 a sum stops growing at
    256 times what is added to it, so a frequent token would lose most of its gradient.
    """
    table = _array(w)
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
    return jax.lax.ragged_dot(x_MD, _array(w_EDF).astype(x_MD.dtype), sizes_E)


def _array(w: Any) -> jax.Array:
    leaf = value(w)
    if not isinstance(leaf, jax.Array):
        raise TypeError(f"a weight of type {type(leaf).__name__} is no leaf that contractions know")
    return leaf
