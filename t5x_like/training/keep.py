"""Which checkpoints are kept, and when one is due: pure functions of steps and metrics. No file is touched here.

Always kept: the newest two, whatever else is said, so that a damaged newest has a predecessor. Kept besides: the last
`keep_last`, every `keep_every` steps, and the best by a metric. The best are an additional set that displaces nothing
(Orbax's own retention by metric with two to keep was seen to delete the newest).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from t5x_like.core.errors import UsageError

_ALWAYS = 2


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`config.checkpoint`: when to save, what to keep, where the first parameters come from."""

    every_steps: int  # the last step and a preemption save too
    asynchronous: bool  # False waits until the disk has it
    timeout_seconds: int  # for one save; then it counts as failed
    keep_last: int  # at least 2
    keep_every: int | None  # steps that it divides are kept for ever
    best_metric: str | None  # a name such as "eval/validation/loss"
    best_mode: str  # "min" or "max"
    keep_best: int  # how many of the best
    init_from: str | None  # a model or work directory whose parameters a new run begins with
    init_select: tuple[str, ...]  # regexes over parameter paths: which of them are taken
    holds: str  # "model", or "trained": without frozen parameters, which stay in the model of init_from
    # DIR[@STEP], by default the newest: a run whose state (parameters, optimizer, step) a new run goes on from.
    branch_from: str | None

    def check(self, path: str) -> None:
        for field in ("every_steps", "timeout_seconds", "keep_best"):
            if getattr(self, field) < 1:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be at least 1")
        if self.keep_last < _ALWAYS:
            raise UsageError(
                f"{path}.keep_last={self.keep_last} should be at least {_ALWAYS}: the newest may be damaged"
            )
        if self.keep_every is not None and self.keep_every < 1:
            raise UsageError(f"{path}.keep_every={self.keep_every} should be at least 1, or None")
        if self.best_mode not in ("min", "max"):
            raise UsageError(f"{path}.best_mode={self.best_mode!r} should be 'min' or 'max'")
        if self.holds not in ("model", "trained"):
            raise UsageError(f"{path}.holds={self.holds!r} should be 'model' or 'trained'")
        if self.branch_from is not None and self.init_from is not None:
            raise UsageError(
                f"{path}.branch_from={self.branch_from!r} and {path}.init_from={self.init_from!r} exclude each other: "
                "a branch takes parameters, optimizer state and step, a warm start parameters alone"
            )


def check_best_metric(config: CheckpointConfig, *, evaluate_every_steps: int) -> None:
    """Raises UsageError where checkpoints are judged by a metric that is not known at each of them."""
    if config.best_metric is None:
        return
    if not evaluate_every_steps:
        raise UsageError(
            f"config.checkpoint.best_metric={config.best_metric!r} needs evaluations; set config.evaluate.every_steps"
        )
    if config.every_steps % evaluate_every_steps:
        raise UsageError(
            f"config.checkpoint.every_steps={config.every_steps} should be a multiple of config.evaluate.every_steps="
            f"{evaluate_every_steps}, so that {config.best_metric!r} is known at each checkpoint"
        )


def is_due(step: int, *, config: CheckpointConfig, last_step: int) -> bool:
    """Whether a checkpoint is saved after `step` steps. A preemption, which comes unasked, saves besides."""
    return step > 0 and (step % config.every_steps == 0 or step == last_step)


def steps_to_keep(
    steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]], *, config: CheckpointConfig
) -> set[int]:
    """The steps to keep out of those that are there; `metrics` by step, where they are known.

    >>> config = CheckpointConfig(10, True, 60, 2, 50, "loss", "min", 1, None, (".*",), "model", None)
    >>> sorted(steps_to_keep([40, 50, 60, 70, 80], {60: {"loss": 1.0}, 70: {"loss": 2.0}}, config=config))
    [50, 60, 70, 80]
    """
    ordered = sorted(steps)
    kept = set(ordered[-max(config.keep_last, _ALWAYS) :])
    if config.keep_every is not None:
        kept |= {step for step in ordered if step % config.keep_every == 0}
    if config.best_metric is not None:
        kept |= set(best_steps(ordered, metrics, config=config)[: config.keep_best])
    return kept


def best_steps(
    steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]], *, config: CheckpointConfig
) -> list[int]:
    """The steps with a finite `best_metric`, best first; of equal ones the newer first."""
    sign = 1 if config.best_mode == "min" else -1
    judged = [(step, metrics.get(step, {}).get(config.best_metric or "")) for step in steps]
    ranked = sorted((sign * value, -step) for step, value in judged if value is not None and math.isfinite(value))
    return [-negative for _, negative in ranked]
