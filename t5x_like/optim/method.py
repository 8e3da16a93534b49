"""The contract of an optimizer for one leaf, and the ones that act on each number alone: AdamW, Lion, SGD.

A method knows neither learning rate, decay nor rules: it turns a gradient into a direction, which the optimizer
scales and subtracts. What it remembers of a leaf are its slots: named arrays described by specs, kept in plain
dicts, so that a checkpoint does not depend on a library's classes.
"""

import dataclasses
import math
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from t5x_like.core.types import ParamSpec
from t5x_like.optim.config import AdamWConfig, LionConfig, SGDConfig

Slots: TypeAlias = dict[str, jax.Array]


class Method(Protocol):
    """`grad` and `param` are fp32 and shaped as `spec`; `count` is the number of updates made before this one."""

    @property
    def name(self) -> str: ...

    def slots(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        """What is remembered of a leaf; all slots start at zero."""
        ...

    def direction(
        self, spec: ParamSpec, grad: jax.Array, slots: Slots, param: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        """(what to subtract, to be multiplied by the learning rate; the slots afterwards)."""
        ...


def moment(spec: ParamSpec) -> ParamSpec:
    """A slot that looks like its parameter, in fp32."""
    return ParamSpec(spec.shape, "float32", spec.axes, "zeros")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam (Kingma and Ba, arXiv 1412.6980, Algorithm 1) of optax's moments; the decoupled decay stands outside."""

    config: AdamWConfig
    name: str = "adamw"

    def slots(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        return {"mu": moment(spec), "nu": moment(spec)}

    def direction(
        self, spec: ParamSpec, grad: jax.Array, slots: Slots, param: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        b1, b2 = self.config.b1, self.config.b2
        mu = optax.tree.update_moment(grad, slots["mu"], b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grad, slots["nu"], b2, 2)
        root = jnp.sqrt(nu / _one_minus_power(b2, count + 1)) + self.config.eps
        return mu / (_one_minus_power(b1, count + 1) * root), {"mu": mu, "nu": nu}


@dataclasses.dataclass(frozen=True)
class Lion:
    """Lion (Chen et al., arXiv 2302.06675, Algorithm 2) from optax."""

    config: LionConfig
    name: str = "lion"

    def slots(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        return {"mu": moment(spec)}

    def direction(
        self, spec: ParamSpec, grad: jax.Array, slots: Slots, param: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        lion = optax.scale_by_lion(self.config.b1, self.config.b2)
        result: tuple[Any, Any] = lion.update(grad, optax.ScaleByLionState(count=count, mu=slots["mu"]))
        return result[0], {"mu": result[1].mu}


@dataclasses.dataclass(frozen=True)
class SGD:
    """Gradient descent with heavy-ball or Nesterov momentum from optax, undamped as torch's."""

    config: SGDConfig
    name: str = "sgd"

    def slots(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        return {"momentum": moment(spec)} if self.config.momentum else {}

    def direction(
        self, spec: ParamSpec, grad: jax.Array, slots: Slots, param: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        if not self.config.momentum:
            return grad, {}
        trace = optax.trace(self.config.momentum, self.config.nesterov)
        result: tuple[Any, Any] = trace.update(grad, optax.TraceState(trace=slots["momentum"]))
        return result[0], {"momentum": result[1].trace}


def _one_minus_power(base: float, exponent: jax.Array) -> jax.Array:
    """1 - base^exponent without cancellation: plainly in fp32, as optax has it, updates are 1e-5 off torch's."""
    if base == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(exponent.astype(jnp.float32) * math.log(base))
