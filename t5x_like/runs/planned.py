"""A run that is planned or checked, and not started; and what its programs are for, in numbers that a plan divides by:
tokens and model FLOPs of one execution."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from t5x_like.models import flops
from t5x_like.models.flops import FlopsPerToken
from t5x_like.parallel.rules import MESH_AXES, PRESETS
from t5x_like.planner.time.estimate import Work
from t5x_like.runs import rl_program, train
from t5x_like.runs.arguments import section
from t5x_like.runs.functions import named_functions
from t5x_like.runs.program import Program, prompt_length
from t5x_like.runs.rl_program import RlExperiment
from t5x_like.runs.train import Experiment


def experiment_of(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Experiment:
    """A training run, or one of reinforcement learning, whose functions are not called."""
    if "rl" not in config:
        return train.from_config(config, overrides=overrides)
    return train.built(RlExperiment, named_functions(config)[0], overrides=overrides)


def named_devices(config: Mapping[str, Any]) -> int:
    """The devices that the mesh of a config names, which need not be sound: an axis that takes what is left counts
    once.

    >>> named_devices({"mesh": {"preset": "fsdp_tensor", "fsdp": None, "tensor": 4}})
    4
    """
    mesh = section(config, "mesh")
    given = {axis: mesh.get(axis) for axis in MESH_AXES}
    sizes = PRESETS.get(str(mesh.get("preset")), {}) | {axis: size for axis, size in given.items() if size is not None}
    return math.prod(size for size in sizes.values() if isinstance(size, int) and size > 0)


def train_work(experiment: Experiment, program: Program, *, executions: int | None = None) -> Work:
    """Of a train step over all devices. executions: of the whole run; the steps of config.loop where nothing is said.

    What is only read (a reference, a teacher) goes forward alone, as in the record of a run.
    """
    rows = experiment.data
    inputs = {name: array.size for name, array in program.batch.items() if name.endswith("inputs")}
    decoded = sum(size for name, size in inputs.items() if name.rpartition("/")[2] == "inputs")

    def needed(each: FlopsPerToken, others: list[FlopsPerToken]) -> float:
        return decoded * (each.train + sum(other.forward for other in others))

    own = program.model.flops_per_token(rows.length, rows.encoder_length)
    others = [role.model.flops_per_token(rows.length, rows.encoder_length) for role in program.roles.values()]
    return Work(
        tokens=sum(inputs.values()),
        model_flops=needed(own, others),
        full_flops=needed(own.unmasked, [other.unmasked for other in others]),
        executions=experiment.loop.steps if executions is None else executions,
    )


def decode_work(experiment: Experiment, *, rows: int, length: int) -> Work:
    """Of one more token for each of `rows` texts, whose cache of `length` is full."""
    needed = rows * flops.of_new_token(experiment.model, length=length, source_length=experiment.data.encoder_length)
    return Work(tokens=rows, model_flops=needed, full_flops=needed)


def prefill_work(experiment: Experiment, *, rows: int, length: int) -> Work:
    """Of reading `rows` prompts of `length` tokens, of an encoder-decoder its sources and start tokens: forward alone,
    and logits of the last token of each."""
    source = experiment.data.encoder_length
    read = prompt_length(experiment, length)
    each = flops.per_token(experiment.model, length=read, source_length=source)

    def needed(attention: float) -> float:
        return rows * (read * (each.weights + attention) + each.head)

    tokens = rows * (read + source)
    return Work(tokens, needed(each.attention), needed(each.full_attention))


def stage_work(experiment: Any, program: Program, stage: rl_program.Stage) -> Work:
    """Of one program of an iteration of reinforcement learning. Tokens of a rollout are those that it may draw at most;
    only of updates the FLOPs are counted."""
    if stage.name == "update":
        return dataclasses.replace(train_work(experiment, program), executions=None)
    if stage.name == "rollout":
        return Work(experiment.rl.answers // stage.times * experiment.rl.new_tokens, None, None)
    return Work(rl_program.tokens_per_step(experiment), None, None)


def iterations(experiment: Any) -> int:
    """Of a whole run."""
    return -(-experiment.loop.steps // rl_program.updates(experiment))
