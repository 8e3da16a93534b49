"""Learning rates as functions of the step. No state: a schedule is a pure function, in jit and on the host alike.

`step` counts updates from 0, and the value at step s is the curve at t = s + 1. So the first update uses
peak / warmup_steps (not 0, which would waste it), the peak is first used by update number `warmup_steps`, and the
last update of the run uses the final fraction. Against transformers, whose first update has a learning rate of 0:
ours(step) = transformers(step + 1). Past `total_steps` the final value stays.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.core.config import named
from t5x_like.core.errors import UsageError
from t5x_like.optim.config import ScheduleConfig, fraction, one_of

Schedule: TypeAlias = Callable[[Int[Array, ""] | int], Float[Array, ""]]
# The factor of the peak as a function of t = 1, 2, ..., from the end of the warmup on (1 before).
_Curve: TypeAlias = Callable[[jax.Array], jax.Array]


def build_schedule(
    config: ScheduleConfig, *, peak: float, total_steps: int, path: str = "config.optim.schedule"
) -> Schedule:
    """The learning rate (fp32 scalar) of each step of a run of `total_steps`. Raises UsageError for impossible steps.

    >>> from t5x_like.optim.config import CosineConfig, LinearConfig, RsqrtConfig, WarmupStableDecayConfig
    >>> config = ScheduleConfig(
    ...     name="linear", steps=6, warmup_steps=2, cosine=CosineConfig(0.0), linear=LinearConfig(0.0),
    ...     rsqrt=RsqrtConfig(None), warmup_stable_decay=WarmupStableDecayConfig(0.2, 0.0, shape="linear"))
    >>> schedule = build_schedule(config, peak=1.0, total_steps=6)
    >>> [float(schedule(step)) for step in range(6)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    one_of(config.name, tuple(SCHEDULES), f"{path}.name")
    warmup = config.warmup_steps
    if total_steps < 1:
        raise UsageError(f"{path}.steps={total_steps} should be at least 1")
    if warmup < 0:
        raise UsageError(f"{path}.warmup_steps={warmup} should be at least 0")
    curve = SCHEDULES[config.name](config, total_steps, path)

    def learning_rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        t = jnp.asarray(step + 1, jnp.float32)  # exact up to 2^24 steps
        rising = jnp.minimum(1.0, t / warmup) if warmup else jnp.ones((), jnp.float32)
        return peak * rising * curve(t)

    return learning_rate


def ends_at_zero(config: ScheduleConfig, *, total_steps: int) -> bool:
    """Whether the learning rate is 0 from update `total_steps` on: whoever goes on trains nothing."""
    return float(build_schedule(config, peak=1.0, total_steps=total_steps)(total_steps)) == 0.0


def _constant(config: ScheduleConfig, total_steps: int, path: str) -> _Curve:
    return jnp.ones_like


def _cosine(config: ScheduleConfig, total_steps: int, path: str) -> _Curve:
    final = named(config).final_fraction
    fraction(final, f"{path}.cosine.final_fraction")
    _check_room(config, total_steps, path)
    return lambda t: _falling("cosine", final, _remaining(t, config.warmup_steps, total_steps))


def _linear(config: ScheduleConfig, total_steps: int, path: str) -> _Curve:
    final = named(config).final_fraction
    fraction(final, f"{path}.linear.final_fraction")
    _check_room(config, total_steps, path)
    return lambda t: _falling("linear", final, _remaining(t, config.warmup_steps, total_steps))


def _rsqrt(config: ScheduleConfig, total_steps: int, path: str) -> _Curve:
    """1 / sqrt(max(t, k)) (Raffel et al., arXiv 1910.10683, section 3.1.2), times sqrt(k) so that it starts at 1."""
    given = named(config).timescale
    timescale = config.warmup_steps if given is None else given
    if timescale < 1:
        raise UsageError(f"{path}.rsqrt.timescale={timescale} should be at least 1 (None takes warmup_steps)")
    return lambda t: jnp.sqrt(timescale / jnp.maximum(t, timescale))


def _warmup_stable_decay(config: ScheduleConfig, total_steps: int, path: str) -> _Curve:
    section, path_of = named(config), f"{path}.warmup_stable_decay"
    fraction(section.decay_fraction, f"{path_of}.decay_fraction")
    fraction(section.final_fraction, f"{path_of}.final_fraction")
    one_of(section.shape, ("linear", "cosine", "sqrt"), f"{path_of}.shape")
    decay_steps = round(section.decay_fraction * total_steps)
    if config.warmup_steps + decay_steps > total_steps:
        raise UsageError(
            f"{path}: {config.warmup_steps} steps of warmup and {decay_steps} of decay exceed the {total_steps} of the "
            "run; lower warmup_steps or decay_fraction"
        )
    start = total_steps - decay_steps
    if decay_steps == 0:
        return jnp.ones_like
    return lambda t: _falling(section.shape, section.final_fraction, _remaining(t, start, total_steps))


SCHEDULES: dict[str, Callable[[ScheduleConfig, int, str], _Curve]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "rsqrt": _rsqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}


def _remaining(t: jax.Array, start: int, end: int) -> jax.Array:
    """1 up to `start`, 0 from `end` on. What is left and not what is done: it stays exact near the end."""
    return jnp.where(t <= start, 1.0, jnp.clip((end - t) / max(1, end - start), 0.0, 1.0))


def _falling(shape: str, final: float, remaining: jax.Array) -> jax.Array:
    """From 1 where all remains to `final` where nothing does."""
    if shape == "linear":
        height = remaining
    elif shape == "sqrt":
        height = remaining / (1.0 + jnp.sqrt(1.0 - remaining))  # 1 - sqrt(1 - remaining) without cancellation
    else:
        height = jnp.square(jnp.sin(0.5 * jnp.pi * remaining))  # (1 - cos(pi * remaining)) / 2, likewise
    return final + (1.0 - final) * height


def _check_room(config: ScheduleConfig, total_steps: int, path: str) -> None:
    if config.warmup_steps > total_steps:
        raise UsageError(
            f"{path}.warmup_steps={config.warmup_steps} exceeds the {total_steps} steps of the run; "
            "lower it or raise config.loop.steps"
        )
