"""What a train step needs of a device's memory, by part, before anything is compiled: from shapes and shardings alone.

State, gradients and what is saved for the backward pass are read off the program as it is traced, so that they follow
every model, remat policy and optimizer; layouts of the compiler (padding) are not in them. `working` is an estimate.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes on one device.

    parameters: trained ones; frozen: those that are read only, of all models; average: the running average of
        parameters
    gradients: as their parameters lie; with several micro-batches their sum and those of one
    saved: activations of a micro-batch that the backward pass finds, by the remat policy
    working: what the backward pass of one layer, or the loss, holds besides at its worst moment (an estimate)
    """

    parameters: int
    frozen: int
    optimizer: int
    average: int
    gradients: int
    saved: int
    working: int

    @property
    def state(self) -> int:
        """What stays between two steps."""
        return self.parameters + self.frozen + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.saved + self.working

    def to_json(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "state": self.state, "total": self.total}


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
    """Shapes of what lies between forward and backward pass, arguments left out."""

    def forward(params: Any, batch: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, batch), params)[1])

    jaxpr = jax.make_jaxpr(forward)(params, batch).jaxpr
    given = {id(variable) for variable in jaxpr.invars}
    kept = {id(variable): variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    return [variable.aval for key, variable in kept.items() if key not in given]


def size(leaf: Any) -> int:
    """Bytes of an array, or of its shape."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
