"""What a run is: the configs of all components side by side, and how they become a model, a step, data and a mesh.

`from_config` is the boundary: past it everything is a frozen dataclass whose values were checked. Nothing here
trains (training/loop.py) or talks to a terminal (commands/).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from t5x_like.core import config as bridge
from t5x_like.core import dtypes, tree
from t5x_like.core.environment import RuntimeConfig
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read import features
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.objectives import table as objectives
from t5x_like.objectives.interface import Objective, policy
from t5x_like.optim import optimizers
from t5x_like.optim import rules as path_rules
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.sharding import abstract_batch
from t5x_like.training import keep
from t5x_like.training import state as train_state
from t5x_like.training.evaluate import EvaluateConfig
from t5x_like.training.loop import LoopConfig
from t5x_like.training.step import StepConfig, make_step
from t5x_like.training.telemetry import TelemetryConfig


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One resolved run. Field names are those of the config's sections."""

    seed: int
    model: model_config.ModelConfig
    data: DataConfig
    mesh: meshes.MeshConfig
    optim: optimizers.OptimConfig
    objective: objectives.ObjectiveConfig
    loop: LoopConfig
    checkpoint: keep.CheckpointConfig
    evaluate: EvaluateConfig
    telemetry: TelemetryConfig
    runtime: RuntimeConfig


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted train step of a run with all that it is called with, in the abstract: nothing is allocated."""

    mesh: Mesh
    model: Model
    objective: Objective
    optimizer: optimizers.Optimizer
    parts: train_state.Parts
    layout: train_state.Layout
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Any  # jitted (state, frozen, batch) -> (state, metrics); the state is donated
    evaluate: Any  # jitted (params, frozen, batch) -> sums


def from_config(
    config: bridge.Values,
    *,
    overrides: Mapping[str, Any] | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment that a ConfigDict or a stored `config.json` describes; strict in both directions.

    `overrides` are the dotted paths given on the command line: one that sets a field of a variant that is not named
    is refused, because it would change nothing. `stored` is the config of the run that is resumed, if any.
    """
    sections: dict[str, Any] = dict(config.items())
    known = bridge.field_names(Experiment)
    for key in sections:
        if key not in known:
            raise UsageError(f"config.{key} is unknown; {bridge.nearest(key, known)}")
    for key in known:
        if key not in sections:
            raise UsageError(f"config.{key} is missing; start the config from configs/common.py")
    _refuse_unnamed_variants(sections, overrides or {})
    loop = bridge.build(LoopConfig, sections["loop"], path="config.loop")
    optim = bridge.build(optimizers.OptimConfig, sections["optim"], path="config.optim")
    if optim.schedule.steps is None:
        # The length of the schedule is that of the first start, whatever a resume does to loop.steps.
        steps = loop.steps if stored is None else stored["optim"]["schedule"]["steps"]
        optim = dataclasses.replace(optim, schedule=dataclasses.replace(optim.schedule, steps=steps))
    experiment = Experiment(
        seed=_seed(sections["seed"]),
        model=model_config.resolve(sections["model"]),
        data=bridge.build(DataConfig, sections["data"], path="config.data"),
        mesh=bridge.build(meshes.MeshConfig, sections["mesh"], path="config.mesh"),
        optim=optim,
        objective=bridge.build(objectives.ObjectiveConfig, sections["objective"], path="config.objective"),
        loop=loop,
        checkpoint=bridge.build(keep.CheckpointConfig, sections["checkpoint"], path="config.checkpoint"),
        evaluate=bridge.build(EvaluateConfig, sections["evaluate"], path="config.evaluate"),
        telemetry=bridge.build(TelemetryConfig, sections["telemetry"], path="config.telemetry"),
        runtime=bridge.build(RuntimeConfig, sections["runtime"], path="config.runtime"),
    )
    _check(experiment)
    return experiment


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """What `config.json` holds; `from_config` reads it back to an equal experiment."""
    return bridge.to_dict(experiment)


def build_model(config: model_config.ModelConfig, *, rules: str, platform: str) -> Model:
    """The model of a config. `rules`: `config.mesh.rules`; `platform`: of the devices that it runs on."""
    policy = dtypes.policy(params=config.dtype.params, compute=config.dtype.compute, platform=platform)
    return Model(config, sharding_rules.rules(rules), policy)


def build_program(experiment: Experiment, mesh: Mesh) -> Program:
    """The train and the evaluation step on a mesh, which may be one of devices that are not there."""
    platform = mesh.devices.flat[0].platform
    model = build_model(experiment.model, rules=experiment.mesh.rules, platform=platform)
    rules = model.rules
    specs = model.specs()
    _check_rules(rules, specs)
    frozen_paths = path_rules.frozen_paths(experiment.optim, specs)
    frozen, trainable = tree.split(specs, lambda path: path in frozen_paths)
    if not trainable:
        raise UsageError("config.optim.freeze leaves no parameter to train; let its rules spare some")
    objective = objectives.build(experiment.objective, {"policy": policy(model)}, features.arrays(experiment.data))
    steps = experiment.optim.schedule.steps
    assert steps is not None, "from_config has filled it in"
    optimizer = optimizers.build(experiment.optim, specs=trainable, total_steps=steps, frozen=frozen_paths)
    parts = train_state.Parts(trainable, rules, {"base": train_state.Frozen(frozen, rules, source=None)})
    layout = train_state.layout(optimizer, parts, ema=experiment.loop.ema_decay is not None, mesh=mesh)
    step = make_step(
        objective, optimizer, rules=rules, param_axes=layout.axes["params"], config=_step_config(experiment)
    )
    options = experiment.runtime.compiler_options.get(platform) or None
    return Program(
        mesh=mesh,
        model=model,
        objective=objective,
        optimizer=optimizer,
        parts=parts,
        layout=layout,
        batch=abstract_batch(mesh, rules, objective.inputs),
        step=jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings(), None), compiler_options=options),
        evaluate=jax.jit(objective.evaluate, compiler_options=options),
    )


def initialize(
    program: Program, *, seed: int, taken: Mapping[str, jax.Array] | None = None
) -> tuple[train_state.State, dict[str, Any]]:
    """The first state and the frozen parameters of a run, each leaf made where it lies; `taken` were read elsewhere."""
    key = jax.random.key(seed)
    return train_state.initialize(program.parts, program.optimizer, key, program.layout, taken=taken or {})


def _step_config(experiment: Experiment) -> StepConfig:
    loop = experiment.loop
    return StepConfig(
        micro_batches=loop.micro_batches,
        clip_norm=experiment.optim.clip_norm,
        ema_decay=loop.ema_decay,
        spike_deviations=None if loop.on_spike == "off" else loop.spike_deviations,
        spike_memory=loop.spike_memory,
        spike_warmup=loop.spike_warmup,
        dropout=experiment.model.dropout > 0,
        seed=experiment.seed,
    )


def _seed(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise UsageError(f"config.seed={value!r} should be a whole number from 0 to 2^32 - 1")
    return value


def _refuse_unnamed_variants(sections: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """An override below a section with `name` must be of a shared field or of the variant that is named."""
    for path in overrides:
        node: Any = sections
        parts = path.split(".")
        for depth, part in enumerate(parts[:-1]):
            node = node[part]
            if "name" in node and hasattr(node[parts[depth + 1]], "items") and len(parts) > depth + 2:
                variant, section = parts[depth + 1], ".".join(parts[: depth + 1])
                if variant != node["name"] and "name" not in node[variant]:
                    raise UsageError(f"config.{path} has no effect, since config.{section}.name={node['name']!r}")


def _check(experiment: Experiment) -> None:
    """Relations between sections and ranges of values, each named with its remedy."""
    loop, data, model = experiment.loop, experiment.data, experiment.model
    for name, value, least in (
        ("loop.steps", loop.steps, 1),
        ("loop.log_every_steps", loop.log_every_steps, 1),
        ("loop.micro_batches", loop.micro_batches, 1),
        ("loop.spike_warmup", loop.spike_warmup, 2),  # a deviation needs two losses
        ("evaluate.every_steps", experiment.evaluate.every_steps, 0),
        ("telemetry.profile.start_step", experiment.telemetry.profile.start_step, 0),
        ("telemetry.profile.steps", experiment.telemetry.profile.steps, 0),
    ):
        if value < least:
            raise UsageError(f"config.{name}={value} should be at least {least}")
    for name, value in (("loop.ema_decay", loop.ema_decay), ("loop.spike_memory", loop.spike_memory)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"config.{name}={value:g} should lie between 0 and 1")
    if loop.spike_deviations <= 0:
        raise UsageError(f"config.loop.spike_deviations={loop.spike_deviations:g} should be above 0")
    if data.length > model.max_length:
        raise UsageError(
            f"config.data.length={data.length} is longer than config.model.max_length={model.max_length}; "
            "shorten the rows or lengthen the model's"
        )
    if loop.ema_decay is not None and model.dtype.params != "float32":
        raise UsageError(
            f"config.loop.ema_decay={loop.ema_decay:g} needs config.model.dtype.params='float32': a change that small "
            f"is lost in {model.dtype.params}"
        )
    if data.batch_size % loop.micro_batches:
        raise UsageError(
            f"config.data.batch_size={data.batch_size} is not divisible by config.loop.micro_batches="
            f"{loop.micro_batches}; use {_multiples(data.batch_size, loop.micro_batches)}"
        )
    for name, value, choices in (
        ("loop.on_nonfinite", loop.on_nonfinite, ("stop", "skip")),
        ("loop.on_spike", loop.on_spike, ("off", "stop", "skip")),
    ):
        if value not in choices:
            raise UsageError(f"config.{name}={value!r} is unknown; {bridge.nearest(value, choices)}")
    keep.check(experiment.checkpoint, evaluate_every_steps=experiment.evaluate.every_steps)
    if experiment.evaluate.ema and loop.ema_decay is None:
        raise UsageError("config.evaluate.ema=True needs config.loop.ema_decay (0.999, say)")


def _multiples(value: int, factor: int) -> str:
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def check_mesh(experiment: Experiment, sizes: Mapping[str, int]) -> None:
    """The batch must divide over the data shards, micro-batch by micro-batch."""
    rules = sharding_rules.rules(experiment.mesh.rules)
    axes = [axis for axis in rules.mesh_axes("batch") if sizes[axis] > 1]
    shards = math.prod(sizes[axis] for axis in axes)
    parts = shards * experiment.loop.micro_batches
    if experiment.data.batch_size % parts:
        composed = " x ".join(f"{axis}={sizes[axis]}" for axis in axes) or "1"
        micro = f" x {experiment.loop.micro_batches} micro-batches" if experiment.loop.micro_batches > 1 else ""
        raise UsageError(
            f"config.data.batch_size={experiment.data.batch_size} is not divisible by the {shards} data shards "
            f"({composed}){micro}; use {_multiples(experiment.data.batch_size, parts)}"
        )
    lengths = math.prod(sizes[axis] for axis in rules.mesh_axes("length"))
    if experiment.data.length % lengths:
        raise UsageError(
            f"config.data.length={experiment.data.length} is not divisible by the {lengths} shards of a row; "
            f"use {_multiples(experiment.data.length, lengths)}"
        )


def _check_rules(rules: sharding_rules.Rules, specs: Any) -> None:
    activations = {name for name in sharding_rules.TABLE if name in ("batch", "length", "kv_length")}
    activations |= {name for name in sharding_rules.TABLE if name.startswith("act_")}
    used = {axis for _, spec in tree.leaves(specs) for axis in spec.axes}
    for name in sharding_rules.unused(rules, used | activations):
        raise UsageError(f"config.mesh.rules changes {name!r}, which no parameter of this model has; remove it")
