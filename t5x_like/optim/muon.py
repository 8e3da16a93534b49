"""Muon for one leaf that is a matrix: momentum made orthogonal (K. Jordan, kellerjordan.github.io/posts/muon).

What is a matrix, and along which dims, is read from the axes in dims.py; every stacked layer and expert is a matrix
of its own. Own code rather than optax.contrib's, which corrects the bias of the Nesterov average (as Nadam does):
Jordan's and torch's do not, and their first directions differ. The other leaves go to AdamW (optimizers.py).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from t5x_like.core.types import Axes, ParamSpec
from t5x_like.optim.config import MuonConfig
from t5x_like.optim.dims import Sides, matrix, over_batch_dims, single
from t5x_like.optim.method import Slots, moment
from t5x_like.parallel.sharding import free_axis_sizes

# Quintic whose slope at 0 is as steep as possible (Jordan, above): singular values end between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclasses.dataclass(frozen=True)
class Muon:
    """One slot, `mu`: the running average of gradients."""

    config: MuonConfig
    name: str = "muon"

    def slots(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        return {"mu": moment(spec)}

    def direction(
        self, spec: ParamSpec, grad: jax.Array, slots: Slots, param: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        dims = matrix(single(spec.axes))
        if dims is None:
            raise ValueError(f"no matrix: axes {spec.axes}")
        momentum = self.config.momentum
        mu = momentum * slots["mu"] + (1 - momentum) * grad
        average = momentum * mu + (1 - momentum) * grad if self.config.nesterov else mu
        one_matrix = functools.partial(self._one_matrix, dims)
        average = by_stack(average, spec.axes)
        (update,) = over_batch_dims(one_matrix, inputs=[spec.axes], outputs=[spec.axes])(average)
        return by_stack(update, spec.axes, back=True), {"mu": mu}

    def _one_matrix(self, dims: Sides, average: jax.Array) -> tuple[jax.Array]:
        fan_in, fan_out = (math.prod(average.shape[dim] for dim in side) for side in dims)
        update = orthogonalize(average.reshape(fan_in, fan_out), steps=self.config.steps).reshape(average.shape)
        return (update * self._scale(fan_in, fan_out),)

    def _scale(self, fan_in: int, fan_out: int) -> float:
        if self.config.scale == "rms":
            return self.config.rms * math.sqrt(max(fan_in, fan_out))
        return math.sqrt(max(1.0, fan_out / fan_in))


def by_stack(x: jax.Array, axes: Axes, *, back: bool = False) -> jax.Array:
    """x with its layers spread over the devices, as far as their number divides: each has whole matrices, whose
    products need no network. The identity without a mesh, and for what is not stacked.

    One mesh axis after the other, and back in the reverse order: moved at once, two are a gather of everything.
    """
    names, parts = [], 1
    if "layers" not in axes:
        return x
    dim = axes.index("layers")
    for name, size in free_axis_sizes().items():
        if size > 1 and x.shape[dim] % (parts * size) == 0:
            names.append(name)
            parts *= size
    steps = range(1, len(names) + 1)
    for count in reversed(steps) if back else steps:
        spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
        spec[dim] = tuple(names[:count])
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
    return x


def orthogonalize(x: Float[Array, "rows cols"], *, steps: int) -> Float[Array, "rows cols"]:
    """Nearly U V^T of x = U S V^T, by `steps` Newton-Schulz iterations; 0 stays 0, and the scale of x is no matter.

    >>> x = orthogonalize(jnp.array([[3e-30, 0.0, 0.0], [0.0, 0.0, -4e-30]]), steps=5)
    >>> bool(jnp.all(jnp.abs(jnp.abs(x[jnp.array([0, 1]), jnp.array([0, 2])]) - 0.95) < 0.25))
    True
    """
    rows, cols = x.shape
    if rows > cols:
        return orthogonalize(x.T, steps=steps).T  # the Gram matrix of the smaller side
    # Twice, so that squares of tiny gradients do not vanish before they are summed.
    x = x / jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(jnp.float32).tiny)
    x = x / jnp.maximum(jnp.linalg.norm(x), 1e-7)  # Frobenius: no singular value exceeds 1, where the quintic is safe
    a, b, c = _COEFFICIENTS
    # Products at default precision: accelerators may take bf16 or TF32, in which Jordan runs the iteration anyway.
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
