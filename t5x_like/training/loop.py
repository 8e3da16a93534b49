"""The training loop: one loop, in one order, for every objective.

    evaluate -> flush metrics through this step -> save -> next batch -> dispatch the step
      -> wait for the previous step's metrics and log them

Do not reorder: a checkpoint must never be ahead of the rows that led to it, and the batch is taken after the save.
At most two steps are in flight, whatever `log_every_steps` is. A row of metrics holds the values of that one step.
Steps are counted from 1: row N is update N, which trained on batch N - 1 of the loader.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax

from t5x_like.core.config import RESUME_MAY_CHANGE, nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.objectives.interface import Batch
from t5x_like.training.evaluate import EvaluateConfig, EvaluateFunction, evaluate
from t5x_like.training.faults import Faults
from t5x_like.training.keep import CheckpointConfig, is_due
from t5x_like.training.saver import Saver
from t5x_like.training.state import State
from t5x_like.training.step import StepFunction
from t5x_like.training.telemetry import Telemetry


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to do about bad updates.

    steps: updates in all
    log_every_steps: rows of metrics are written every so many steps
    micro_batches: parts of a batch whose gradients are added one after the other
    ema_decay: decay of the running average of parameters, in (0, 1), None for none
    on_nonfinite: "stop" or "skip" when loss or gradient norm is NaN or infinite; the update is refused either way
    on_spike: "off", "stop" or "skip" when the loss is `spike_deviations` standard deviations above its running mean
    spike_memory: decay of the running mean and variance; `spike_warmup`: losses before the test begins
    """

    steps: int = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    log_every_steps: int = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    micro_batches: int
    ema_decay: float | None
    on_nonfinite: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    on_spike: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    spike_deviations: float
    spike_memory: float
    spike_warmup: int

    def check(self, path: str) -> None:
        # A standard deviation needs two losses.
        for field, least in (("steps", 1), ("log_every_steps", 1), ("micro_batches", 1), ("spike_warmup", 2)):
            if getattr(self, field) < least:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be at least {least}")
        for field, value in (("ema_decay", self.ema_decay), ("spike_memory", self.spike_memory)):
            if value is not None and not 0 < value < 1:
                raise UsageError(f"{path}.{field}={value:g} should lie between 0 and 1")
        if not self.spike_deviations > 0:
            raise UsageError(f"{path}.spike_deviations={self.spike_deviations:g} should be above 0")
        for field, choices in (("on_nonfinite", ("stop", "skip")), ("on_spike", ("off", "stop", "skip"))):
            if getattr(self, field) not in choices:
                raise UsageError(
                    f"{path}.{field}={getattr(self, field)!r} is unknown; {nearest(getattr(self, field), choices)}"
                )


class Source(Protocol):
    """Where batches come from. What depends on the state (answers of the policy) may be made when a batch is asked for;
    whatever a resume needs of it then stands in `items`."""

    def batch(self, step: int, state: State, frozen: Mapping[str, Any], /) -> Batch:
        """The sharded arrays of update `step` + 1."""
        ...

    def values(self) -> Mapping[str, float]:
        """What is known of the last batch on the host, for the row of its update."""
        ...

    def items(self) -> Mapping[str, Any]:
        """Parts of the state that a checkpoint holds besides those of the step (training/saver.py), by name."""
        ...


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Batches that are a pure function of their index (0 for step 1)."""

    at: Callable[[int], Batch]

    def batch(self, step: int, state: State, frozen: Mapping[str, Any]) -> Batch:
        del state, frozen
        return self.at(step)

    def values(self) -> Mapping[str, float]:
        return {}

    def items(self) -> Mapping[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the loop runs: built values, no configs of other components."""

    config: LoopConfig
    evaluate_config: EvaluateConfig
    checkpoint_config: CheckpointConfig
    step: StepFunction
    evaluate: EvaluateFunction
    source: Source
    held_out: Mapping[str, Iterable[Any]]  # batches as `evaluate` takes them
    saver: Saver
    telemetry: Telemetry
    faults: Faults


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The last state, whether all is done (steps and last evaluation), and that {"eval/NAME/loss": value, ...}."""

    state: State
    finished: bool
    evaluation: dict[str, float]


def train(loop: Loop, state: State, frozen: dict[str, Any], *, start: int, evaluation: Mapping[str, float]) -> Outcome:
    """Trains from `start` updates done, where `evaluation` was found ({} if it was not made), to `config.steps`.

    Ends early, saved, when the process is asked to stop: an evaluation that is due then is left to the resume. Raises
    UserError when a bad update asks for a stop.
    """
    telemetry, faults, total = loop.telemetry, loop.faults, loop.config.steps
    step, pending, found = start, None, dict(evaluation)
    evaluated = start if found else None
    while True:
        last = step == total
        stopping = step > start and faults.should_stop(step)
        evaluating = evaluated != step > 0 and (last or _due(step, loop.evaluate_config.every_steps))
        saving = step > start and is_due(step, config=loop.checkpoint_config, last_step=total)
        if evaluating or saving or stopping:
            _report(loop, pending)
            pending = None
        if evaluating and not stopping:
            with faults.phase("evaluate"), telemetry.timed("evaluate"):
                results = _evaluate(loop, state, frozen, step)
            if results is None:
                stopping = True
            else:
                found, evaluated = results, step
                if step == start:  # saved unevaluated, when the process was asked to stop
                    loop.saver.judge(step, found)
        if saving or stopping and step > start:
            telemetry.flush(step, last=last)
            with faults.phase("save"), telemetry.timed("checkpoint"):
                loop.saver.save(step, {**state, **loop.source.items()}, frozen, found if evaluated == step else {})
                if last or stopping:
                    loop.saver.wait()
        if last or stopping:
            return Outcome(state, last and not stopping, found)

        faults.enter("step")
        with telemetry.timed("input"):
            batch = loop.source.batch(step, state, frozen)
        telemetry.before_step(step + 1)
        state, metrics = loop.step(state, frozen, batch)
        metrics = {**metrics, **loop.source.values()}
        _report(loop, pending)
        step += 1
        pending = (step, metrics)


def _report(loop: Loop, pending: tuple[int, Mapping[str, Any]] | None) -> None:
    """Waits for the metrics of a step, writes them if due, and acts on a refused update."""
    if pending is None:
        return
    step, device_metrics = pending
    metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    finite, spike, skipped = (metrics.pop(name) > 0 for name in ("finite", "spike", "skipped"))
    if skipped:
        metrics["skipped"] = 1.0
    due = skipped or step == loop.config.steps or _due(step, loop.config.log_every_steps)
    loop.telemetry.log_step(step, metrics, write=due)
    if not finite and loop.config.on_nonfinite == "stop":
        raise UserError(_bad_update(step, f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}", "nonfinite"))
    if spike and loop.config.on_spike == "stop":
        raise UserError(_bad_update(step, f"loss {metrics['loss']:.4f} is a spike", "spike"))


def _bad_update(step: int, what: str, field: str) -> str:
    return (
        f"step {step}: {what}; the update was refused and the run stops (config.loop.on_{field}=stop; "
        f"'skip' goes on; t5x_like inspect DIR --step={step} names the documents)"
    )


def _evaluate(loop: Loop, state: State, frozen: dict[str, Any], step: int) -> dict[str, float] | None:
    """Evaluates on every held-out set and logs it; {"eval/NAME/loss": value, ...}. None if it was interrupted."""
    params = state["ema"] if loop.evaluate_config.ema and "ema" in state else state["params"]
    results: dict[str, dict[str, float]] = {}
    for name, batches in loop.held_out.items():
        values = evaluate(loop.evaluate, params, frozen, batches, stop=loop.faults.interrupted)
        if values is None:
            return None
        results[name] = values
    for name, values in results.items():
        loop.telemetry.log_evaluation(step, name, values)
    return {
        f"eval/{name}/{key}": value
        for name, values in results.items()
        for key, value in values.items()
        if math.isfinite(value)
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
