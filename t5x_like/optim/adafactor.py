"""Adafactor (Shazeer and Stern, arXiv 1804.04235) for one leaf: second moments kept as row and column means.

Not optax's: that one factors over the two largest dims, whatever they mean. Here the sides of a matrix come from
its axes (q is embed x (heads*head)), and every stacked layer and expert is a tensor of its own. Differences from
the paper: decoupled weight decay and the learning rate stand outside, so `momentum` averages unscaled updates.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from t5x_like.core.types import ParamSpec
from t5x_like.optim.config import AdafactorConfig
from t5x_like.optim.dims import BATCH_AXES, Sides, over_batch_dims, sides, single
from t5x_like.optim.method import Slots, moment


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Slots `row` and `col` of a matrix with both sides large enough, `full` otherwise; `momentum` if on."""

    config: AdafactorConfig
    name: str = "adafactor"

    def slots(self, spec: ParamSpec) -> dict[str, ParamSpec]:
        factored = self._sides(spec)
        if factored is None:
            slots = {"full": moment(spec)}
        else:
            rows, cols = factored
            slots = {"row": _without(spec, cols), "col": _without(spec, rows)}
        return slots if self.config.momentum is None else slots | {"momentum": moment(spec)}

    def direction(
        self, spec: ParamSpec, grad: jax.Array, slots: Slots, param: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, Slots]:
        described = self.slots(spec)
        names = [name for name in described if name != "momentum"]
        axes = [described[name].axes for name in names]
        # 1 - t^-c (section 7.2); t is 1 at the first update, which therefore forgets the zeros it starts from.
        beta = 1.0 - (count + 1).astype(jnp.float32) ** (-self.config.decay_rate)
        one_tensor = functools.partial(self._one_tensor, self._sides(spec), beta)
        update, *statistics = over_batch_dims(
            one_tensor, inputs=[spec.axes, spec.axes, *axes], outputs=[spec.axes, *axes]
        )(grad, param, *(slots[name] for name in names))
        new = dict(zip(names, statistics, strict=True))
        if self.config.momentum is not None:
            update = self.config.momentum * slots["momentum"] + (1 - self.config.momentum) * update
            new["momentum"] = update
        return update, new

    def _one_tensor(
        self, factored: Sides | None, beta: jax.Array, grad: jax.Array, param: jax.Array, *statistics: jax.Array
    ) -> tuple[jax.Array, ...]:
        square = jnp.square(grad) + self.config.eps
        if factored is None:
            full = beta * statistics[0] + (1 - beta) * square
            update, statistics = grad * jax.lax.rsqrt(full), (full,)
        else:
            rows, cols = factored
            row = beta * statistics[0] + (1 - beta) * jnp.mean(square, axis=cols)
            col = beta * statistics[1] + (1 - beta) * jnp.mean(square, axis=rows)
            row_full = jnp.expand_dims(row, cols)  # Algorithm 4: V = row col / mean(row)
            row_factor = jax.lax.rsqrt(row_full / jnp.mean(row_full, axis=rows, keepdims=True))
            update = grad * row_factor * jnp.expand_dims(jax.lax.rsqrt(col), rows)
            statistics = (row, col)
        if self.config.clip_threshold is not None:
            update = update / jnp.maximum(1.0, _rms(update) / self.config.clip_threshold)
        if self.config.min_scale is not None:
            update = update * jnp.maximum(self.config.min_scale, _rms(param))
        return (update, *statistics)

    def _sides(self, spec: ParamSpec) -> Sides | None:
        """The last two sides of one tensor, if both are large enough to be worth it."""
        groups = sides(single(spec.axes))
        sizes = [size for size, axis in zip(spec.shape, spec.axes, strict=True) if axis not in BATCH_AXES]
        if len(groups) < 2:
            return None
        smaller = min(math.prod(sizes[dim] for dim in group) for group in groups[-2:])
        return (groups[-2], groups[-1]) if smaller >= self.config.min_dim_size_to_factor else None


def _without(spec: ParamSpec, dims: tuple[int, ...]) -> ParamSpec:
    """What a mean over `dims` of each single tensor leaves of the stacked ones."""
    of_tensor = [dim for dim, axis in enumerate(spec.axes) if axis not in BATCH_AXES]
    gone = {of_tensor[dim] for dim in dims}
    kept = [dim for dim in range(len(spec.shape)) if dim not in gone]
    return ParamSpec(tuple(spec.shape[dim] for dim in kept), "float32", tuple(spec.axes[dim] for dim in kept), "zeros")


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
