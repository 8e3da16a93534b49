"""What `t5x_like train` does once threads and devices are fixed: joins processes, builds the run, trains, reports.

Everything is handed down as built values; the order of training itself stands in training/loop.py.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_like import experiment as experiments
from t5x_like.commands.train import Request
from t5x_like.core import tree
from t5x_like.core.environment import Environment
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.metrics import format_bytes, format_count
from t5x_like.data.loader import TrainData, open_data
from t5x_like.data.prepare import prepare
from t5x_like.objectives.interface import Batch
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import multihost
from t5x_like.parallel.sharding import addressable_rows, global_batch
from t5x_like.storage import manifest
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.workdir import Workdir
from t5x_like.training.faults import PREEMPTED, Faults
from t5x_like.training.keep import keep
from t5x_like.training.loop import Loop, train
from t5x_like.training.saver import Saver
from t5x_like.training.telemetry import Telemetry

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: updates done, state, frozen parameters, and how these came about."""

    step: int
    state: dict[str, Any]
    frozen: dict[str, Any]
    origin: str


def run(request: Request, *, config: Mapping[str, Any], stored: Mapping[str, Any] | None, environment: Environment) -> int:
    """The exit status of a training run, or of its `--check`."""
    experiment = experiments.from_config(config, overrides=request.overrides, stored=stored)
    processes = multihost.start(
        experiment.runtime,
        coordinator=request.coordinator,
        process_id=request.process_id,
        num_processes=request.num_processes,
    )
    experiments.check_mesh(experiment, meshes.axis_sizes(experiment.mesh, jax.device_count()))
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(Workdir.open(request.workdir, processes=processes, write=not request.check))
        changes = workdir.check_config(experiments.to_dict(experiment))
        faults = stack.enter_context(Faults(experiment.runtime, log_path=workdir.log_path, processes=processes))
        data = stack.enter_context(_open_data(experiment, workdir, processes, faults))
        return _run(request, experiment, environment, processes, workdir, faults, data, changes)


def _open_data(experiment: experiments.Experiment, workdir: Workdir, processes: multihost.Processes, faults: Faults) -> TrainData:
    """The prepared data; process 0 prepares what is missing while the others wait."""
    cache = experiment.data.cache or workdir.path("cache")
    if processes.primary:
        prepare(experiment.data, cache, report=None)
    processes.broadcast("prepared", True, timeout=math.inf)
    data = open_data(experiment.data, cache_dir=cache, seed=experiment.seed)
    size = experiment.model.vocab_size
    if size < data.vocabulary.size:
        raise UsageError(
            f"config.model.vocab_size={size}, but the tokenizer {experiment.data.tokenizer} has {data.vocabulary.size} "
            f"tokens; set config.model.vocab_size={data.vocabulary.size}"
        )
    return data
