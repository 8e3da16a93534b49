"""What lies between the forward and the backward pass of a loss, read off its trace."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

# What gives back what it gets: remat puts some of these around what it saves.
_SAME = ("name", "reduce_precision", "optimization_barrier", "sharding_constraint", "copy")

_LOOPS = ("scan", "while")


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
    given, sources = {id(variable) for variable in jaxpr.invars}, _Sources(jaxpr)
    kept = {sources.of(variable): variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    found = [variable.aval for variable in kept.values() if id(variable) not in given]
    return [aval for aval in found if getattr(aval.memory_space, "name", "") != "Host"]


class _Sources:
    """Where each variable of a program comes from, through names and out of inner programs (loops, remat): two that
    come from one value are one array, which the compiler holds once."""

    def __init__(self, jaxpr: Any):
        self._made = {id(out): (equation, n) for equation in jaxpr.eqns for n, out in enumerate(equation.outvars)}

    def of(self, variable: Any) -> tuple[int, ...]:
        equation, number = self._made.get(id(variable), (None, 0))
        if equation is None:
            return (id(variable),)
        if equation.primitive.name in _SAME:
            return self.of(equation.invars[number])
        inner = equation.params.get("jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        if inner is None or len(inner.outvars) != len(equation.outvars):
            return (id(variable),)
        source = _Sources(inner).of(inner.outvars[number])
        inputs: dict[tuple[int, ...], Any] = {
            (id(given),): outer for given, outer in zip(inner.invars, equation.invars, strict=False)
        }
        if source in inputs and equation.primitive.name not in _LOOPS:  # handed through
            return self.of(inputs[source])
        return (id(equation), *source)


def size(leaf: Any) -> int:
    """Bytes of an array, or of its shape."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
