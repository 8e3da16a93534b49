"""What lies between the forward and the backward pass of a loss, read off its trace."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal


def saved_bytes(loss: Callable[[Any, Any], Any], params: Any, batches: tuple[Any, Any]) -> int:
    """Bytes that the forward pass of `loss(params, batch)` leaves for the backward pass, parameters not counted.

    params: shapes. batches: shapes of a batch, and of one with another number of rows, by which activations are told
    from what depends on the parameters alone, such as casts of weights.
    """
    here, other = (_residuals(loss, params, batch) for batch in batches)
    if len(here) == len(other):  # else a part of the program depends on the number of rows: all counts
        here = [leaf for leaf, beside in zip(here, other, strict=True) if leaf.shape != beside.shape]
    return sum(size(leaf) for leaf in here)


def _residuals(loss: Callable[[Any, Any], Any], params: Any, batch: Any) -> list[Any]:
    """Shapes of what lies on the device between forward and backward pass, arguments left out."""

    def forward(params: Any, batch: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, batch), params)[1])

    jaxpr = jax.make_jaxpr(forward)(params, batch).jaxpr
    given = {id(variable) for variable in jaxpr.invars}
    kept = {id(variable): variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    found = [variable.aval for key, variable in kept.items() if key not in given]
    return [aval for aval in found if getattr(aval.memory_space, "name", "") != "Host"]


def size(leaf: Any) -> int:
    """Bytes of an array, or of its shape."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
