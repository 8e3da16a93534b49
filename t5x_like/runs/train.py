"""A training run: the configs of all components side by side, and what must hold between them.

`from_config` is the boundary: past it everything is a frozen dataclass whose values were checked, those of one section
by the section's own class. Nothing here builds a step (program.py), trains (training/) or talks to a terminal.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from t5x_like.core import config as bridge
from t5x_like.core.environment import RuntimeConfig
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read import features
from t5x_like.data.read.features import FEATURES
from t5x_like.models import config as model_config
from t5x_like.objectives import table as objectives
from t5x_like.optim import optimizers
from t5x_like.optim.schedules import ends_at_zero
from t5x_like.parallel import mesh as meshes
from t5x_like.peft.config import AdapterConfig
from t5x_like.runs import branch, sections
from t5x_like.runs.roles import RoleConfig, check_names
from t5x_like.training import keep
from t5x_like.training.evaluate import EvaluateConfig
from t5x_like.training.loop import LoopConfig
from t5x_like.training.telemetry import TelemetryConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One resolved run. Field names are those of the config's sections."""

    seed: int
    model: model_config.ModelConfig
    adapter: AdapterConfig
    data: DataConfig
    mesh: meshes.MeshConfig = dataclasses.field(metadata=bridge.RESUME_MAY_CHANGE)
    optim: optimizers.OptimConfig
    objective: objectives.ObjectiveConfig
    # By name; what a resume may not change of them are their parameters, which training/saver.py compares.
    roles: dict[str, RoleConfig] = dataclasses.field(metadata=bridge.RESUME_MAY_CHANGE)
    loop: LoopConfig
    checkpoint: keep.CheckpointConfig = dataclasses.field(metadata=bridge.RESUME_MAY_CHANGE)
    evaluate: EvaluateConfig = dataclasses.field(metadata=bridge.RESUME_MAY_CHANGE)
    telemetry: TelemetryConfig = dataclasses.field(metadata=bridge.RESUME_MAY_CHANGE)
    runtime: RuntimeConfig = dataclasses.field(metadata=bridge.RESUME_MAY_CHANGE)

    @property
    def wanted_roles(self) -> tuple[str, ...]:
        """The names of the models that the run reads, the policy first."""
        return (*objectives.wanted_roles(self.objective), *self.cached_roles)

    @property
    def cached_roles(self) -> tuple[str, ...]:
        """Those of them that no step holds (runs/reference_logp.py)."""
        return objectives.cached_roles(self.objective)

    def arrays(self) -> dict[str, ArraySpec]:
        """What the data has for a batch."""
        return features.arrays(self.data)

    def check(self, path: str) -> None:
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"{path}.seed={self.seed} should be a whole number from 0 to 2^32 - 1")
        _check_relations(self)


MAY_CHANGE = sections.may_change(Experiment)


Run = TypeVar("Run", bound=Experiment)


def from_config(
    config: bridge.Values,
    *,
    overrides: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Experiment:
    """The training run that a ConfigDict or the sections of a stored config describe, as `built`."""
    return built(Experiment, config, overrides=overrides, stored=stored)


def built(
    cls: type[Run],
    config: bridge.Values,
    *,
    overrides: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Run:
    """The run of a class that a ConfigDict or the sections of a stored config describe; strict in both directions.

    `overrides` are the dotted paths given on the command line: one that sets a field of a variant that is not named
    is refused, because it would change nothing. `stored` is the config of the run that is resumed, if any.
    """
    given: dict[str, Any] = dict(config.items())
    if "model" in given:
        given["model"] = model_config.filled(given["model"])
    sections.refuse_unnamed_variants(cls, given, overrides or {})
    experiment = bridge.build(cls, given, path="config")
    if stored is not None:
        before = sections.value(stored, "checkpoint.branch_from")
        experiment = branch.replaced(experiment, branch.settled(experiment.checkpoint.branch_from, before))
    if experiment.optim.schedule.steps is None:
        # The length of the schedule is that of the first start, whatever a resume does to loop.steps.
        steps = sections.value(stored or {}, "optim.schedule.steps") or experiment.loop.steps
        schedule = dataclasses.replace(experiment.optim.schedule, steps=steps)
        experiment = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, schedule=schedule))
    return experiment


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """What `config.json` holds; `from_config` reads it back to an equal experiment."""
    return bridge.to_dict(experiment)


def check_schedule(experiment: Experiment) -> None:
    """Raises UsageError for a run that goes on past the end of a schedule that ends at 0: it would train nothing."""
    schedule, steps = experiment.optim.schedule, experiment.loop.steps
    assert schedule.steps is not None, "from_config has filled it in"
    if steps <= schedule.steps or not ends_at_zero(schedule, total_steps=schedule.steps):
        return
    path = "config.optim.schedule"
    raise UsageError(
        f"config.loop.steps={steps} goes past the end of the schedule, {path}.steps={schedule.steps}, where the "
        f"learning rate is 0 and nothing is trained; set {path}.steps={steps}, or "
        f"{path}.{schedule.name}.final_fraction above 0, or decay from an earlier checkpoint in a new --workdir by "
        "config.checkpoint.branch_from=DIR@STEP"
    )


def _check_relations(experiment: Experiment) -> None:
    """What must hold between sections, each with its remedy."""
    loop, data, model = experiment.loop, experiment.data, experiment.model
    for field in ("length", "encoder_length"):
        if getattr(data, field) > model.max_length:
            raise UsageError(
                f"config.data.{field}={getattr(data, field)} is longer than config.model.max_length="
                f"{model.max_length}; shorten the rows or lengthen the model's"
            )
    _check_features(experiment)
    _check_dropout(experiment)
    check_names(experiment.roles, experiment.wanted_roles, objective=experiment.objective.name)
    checkpoint = experiment.checkpoint
    if experiment.adapter.name != "none" and checkpoint.init_from is None and checkpoint.branch_from is None:
        raise UsageError(
            f"config.adapter.name={experiment.adapter.name!r} trains an adapter of a model that is there; give its "
            "directory as config.checkpoint.init_from"
        )
    if loop.ema_decay is not None and model.dtype.params != "float32":
        raise UsageError(
            f"config.loop.ema_decay={loop.ema_decay:g} needs config.model.dtype.params='float32': a change that small "
            f"is lost in {model.dtype.params}"
        )
    if data.batch_size % loop.micro_batches:
        raise UsageError(
            f"config.data.batch_size={data.batch_size} is not divisible by config.loop.micro_batches="
            f"{loop.micro_batches}; use {multiples(data.batch_size, loop.micro_batches)}"
        )
    keep.check_best_metric(experiment.checkpoint, evaluate_every_steps=experiment.evaluate.every_steps)
    if experiment.evaluate.ema and loop.ema_decay is None:
        raise UsageError("config.evaluate.ema=True needs config.loop.ema_decay (0.999, say)")


def _check_dropout(experiment: Experiment) -> None:
    """Objectives that compare two log-probabilities or rewards do it without dropout, as TRL's trainers do."""
    lora, name = experiment.adapter.lora, experiment.objective.name
    if name not in ("dpo", "reward"):
        return
    for field, dropout in (("model", experiment.model.dropout), ("adapter.lora", lora.dropout if lora else 0.0)):
        if dropout:
            raise UsageError(
                f"config.{field}.dropout={dropout:g}: config.objective.name={name!r} compares two answers, which "
                "dropout would set apart; set it to 0"
            )


def _check_features(experiment: Experiment) -> None:
    """The data must give what the objective and the model read."""
    name, wanted = experiment.objective.name, experiment.data.features
    known = objectives.OBJECTIVES[name].features
    if wanted not in known:
        raise UsageError(
            f"config.data.features={wanted!r} is nothing for config.objective.name={name!r}; use one of "
            f"{', '.join(known)}"
        )
    two = experiment.model.architecture == "encoder_decoder"
    if two != (experiment.data.encoder_length > 0):
        what = "reads a source" if two else "has no encoder"
        remedy = f"use {'source_target or span_corruption' if two else 'causal'}"
        if FEATURES[wanted].encoder is None:
            remedy = f"set config.data.encoder_length to {'the most tokens of a prompt' if two else 0}"
        raise UsageError(
            f"config.data.features={wanted!r} with config.data.encoder_length={experiment.data.encoder_length} does "
            f"not fit config.model.architecture={experiment.model.architecture!r}, which {what}; {remedy}"
        )


def multiples(value: int, factor: int) -> str:
    """The multiples of a factor on both sides of a value, for an error line."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)
