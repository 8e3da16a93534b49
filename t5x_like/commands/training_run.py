"""What `t5x_like train` does once threads and devices are fixed: joins processes, builds the run, trains, reports.

Everything is handed down as built values; the order of training itself stands in training/loop.py.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from t5x_like.commands import summary
from t5x_like.commands.prepare import show_progress
from t5x_like.core.config import nearest
from t5x_like.core.environment import Environment
from t5x_like.core.errors import UsageError
from t5x_like.data.read.loader import HeldOut, Prefetch, TrainData, open_data
from t5x_like.data.tokenizers.vocabularies import SETTINGS
from t5x_like.objectives.interface import Batch
from t5x_like.optim.optimizers import describe
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import multihost
from t5x_like.parallel.sharding import addressable_rows, global_batch
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.roles import check_tokenizers
from t5x_like.storage import manifest, paths
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint
from t5x_like.storage.workdir import Workdir
from t5x_like.training import loop as loops
from t5x_like.training.faults import PREEMPTED, Faults
from t5x_like.training.keep import steps_to_keep
from t5x_like.training.saver import Saver, take
from t5x_like.training.telemetry import Telemetry, screen


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    workdir: str
    check: bool
    coordinator: str | None
    process_id: int | None
    num_processes: int | None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as built, before it has a state."""

    experiment: experiments.Experiment
    environment: Environment
    processes: multihost.Processes
    workdir: Workdir
    faults: Faults
    data: TrainData
    program: programs.Program
    overrides: Mapping[str, Any]
    changes: list[str]  # what the config changes of the stored one


def run(
    request: Request,
    *,
    config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    stored: Mapping[str, Any] | None,
    environment: Environment,
) -> int:
    """The exit status of a training run, or of its `--check`."""
    experiment = experiments.from_config(config, overrides=overrides, stored=stored)
    processes = multihost.start(
        experiment.runtime,
        coordinator=request.coordinator,
        process_id=request.process_id,
        num_processes=request.num_processes,
    )
    with contextlib.ExitStack() as stack:
        # Before anything that may fail: an exception on one process must reach the others, not wait for them.
        faults = stack.enter_context(Faults(experiment.runtime, log_path=None, processes=processes))
        programs.check_mesh(experiment, meshes.axis_sizes(experiment.mesh, jax.device_count()))
        workdir = stack.enter_context(Workdir.open(request.workdir, processes=processes, write=not request.check))
        changes = [
            str(change)
            for change in workdir.check_config(experiments.to_dict(experiment), may_change=experiments.MAY_CHANGE)
        ]
        # Built before the data is prepared, which may take long: what is wrong with the config shows first.
        mesh = meshes.make(experiment.mesh)
        stack.enter_context(jax.set_mesh(mesh))
        program = programs.step_program(experiment, mesh)
        if not request.check and _is_finished(experiment, workdir, program):
            return 0
        with faults.phase("prepare"):
            data = _open_data(experiment, workdir, processes)
        stack.callback(data.close)
        check_tokenizers(program.roles, data.vocabulary.fingerprint)
        _check_best_metric(experiment.checkpoint.best_metric, program, data)
        built = Run(experiment, environment, processes, workdir, faults, data, program, overrides, changes)
        return _check(built) if request.check else _train(built)


def _is_finished(experiment: experiments.Experiment, workdir: Workdir, program: programs.Program) -> bool:
    """Whether all steps are done and their checkpoint is there and whole; says what it found."""
    done = workdir.finished_step()
    if done is None or experiment.loop.steps > done:
        return False
    checkpoints = Checkpoints(workdir.checkpoints, read_only=True)
    try:
        holds = experiment.checkpoint.holds
        restored = Saver(checkpoints, parts=program.parts, layout=program.layout, holds=holds, metadata={}).restore()
        found = "is missing" if restored is None or restored[0] < done else ""
    except DamagedCheckpoint:
        found = "is damaged"
    if found:
        summary.warn(
            f"{workdir.root} was finished at step {done}, but the checkpoint of that step {found}; the lost steps are "
            "trained again from the newest that is whole"
        )
        return False
    print(f"{workdir.root} is finished: {done} of {done} steps are done")
    return True


def _open_data(experiment: experiments.Experiment, workdir: Workdir, processes: multihost.Processes) -> TrainData:
    """The prepared data; process 0 prepares what is missing while the others wait."""
    cache = experiment.data.cache or workdir.path("cache")
    if processes.primary:
        show_progress(experiment.data, cache)
    processes.broadcast("data is prepared", True, timeout=math.inf)
    data = open_data(experiment.data, cache_dir=cache, seed=experiment.seed)
    processes.agree("data fingerprint", data.fingerprint)
    workdir.check_data(data.fingerprint)
    if experiment.model.vocab_size != data.vocabulary.size:
        raise UsageError(
            f"config.model.vocab_size={experiment.model.vocab_size}, but the tokenizer {experiment.data.tokenizer!r} "
            f"has {data.vocabulary.size} tokens; set config.model.vocab_size={data.vocabulary.size}"
        )
    return data


def _check_best_metric(wanted: str | None, program: programs.Program, data: TrainData) -> None:
    """Checkpoints can be judged only by what an evaluation gives."""
    if wanted is None:
        return
    layout = program.layout
    sums = jax.eval_shape(program.evaluate, layout.state["params"], layout.frozen, program.batch)
    measured = [*sums, "perplexity"] if "loss" in sums else list(sums)
    names = [f"eval/{held_out}/{name}" for held_out in data.evaluation_batches() for name in measured]
    if wanted not in names:
        known = nearest(wanted, names) if names else "nothing is held out (config.data.validation)"
        raise UsageError(f"config.checkpoint.best_metric={wanted!r} is no result of an evaluation; {known}")


def _compile(built: Run) -> tuple[Any, Any]:
    """The compiled train and evaluation steps; from here on no step waits for the compiler."""
    program, layout = built.program, built.program.layout
    with built.faults.phase("compile"):
        step = program.step.lower(layout.state, layout.frozen, program.batch).compile()
        if not built.data.evaluation_batches():
            return step, None
        return step, program.evaluate.lower(layout.state["params"], layout.frozen, program.batch).compile()


def _check(built: Run) -> int:
    step, _ = _compile(built)
    for line in screen(_summary(built, step, origin="not started (--check)", start=0)):
        print(line)
    print(f"\n{describe(built.program.optimizer)}")
    return 0


def _train(built: Run) -> int:
    experiment, workdir = built.experiment, built.workdir
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir.checkpoints,
                keep=functools.partial(steps_to_keep, config=experiment.checkpoint),
                asynchronous=experiment.checkpoint.asynchronous,
                timeout_seconds=experiment.checkpoint.timeout_seconds,
                on_fault=summary.warn,
            )
        )
        with built.faults.guard():
            outcome = _loop(built, checkpoints, stack)
    if not outcome.finished:
        summary.warn(f"{workdir.root} is saved; start the same command again to go on")
        return PREEMPTED
    # Only now: the last rows and the checkpoint are where they belong.
    workdir.record_finished(experiment.loop.steps)
    if built.processes.primary:
        for line in summary.closing(workdir.root, outcome.evaluation, plot=experiment.telemetry.plot):
            print(line)
    return 0


def _loop(built: Run, checkpoints: Checkpoints, stack: contextlib.ExitStack) -> loops.Outcome:
    """Restores or makes the state, compiles, and trains; what is to be closed at the end goes onto `stack`."""
    experiment, program = built.experiment, built.program
    saver = Saver(
        checkpoints,
        parts=program.parts,
        layout=program.layout,
        holds=experiment.checkpoint.holds,
        metadata=_metadata(built),
    )
    start, state, frozen, evaluation, origin = _start(built, saver)
    if start > experiment.loop.steps:
        raise UsageError(
            f"config.loop.steps={experiment.loop.steps}, but {built.workdir.root} has a checkpoint of step {start}; "
            f"use at least {start}"
        )
    _record(built, start)
    telemetry = stack.enter_context(
        Telemetry(
            experiment.telemetry,
            built.workdir.root,
            flops_per_token=_flops_per_token(built),
            tokens_per_step=built.data.tokens_per_step,
            devices=list(program.mesh.devices.flat),
            compiler_options=experiment.runtime.compiler_options.of(jax.default_backend()),
            total_steps=experiment.loop.steps,
            start_step=start,
        )
    )
    built.faults.log_to(telemetry.log_path)
    with telemetry.timed("compile"):
        step, evaluate = _compile(built)
    telemetry.summary(_summary(built, step, origin=origin, start=start))
    prefetch = Prefetch(_read_rows(built), ahead=experiment.data.prefetch)
    stack.callback(prefetch.close)
    loop = loops.Loop(
        config=experiment.loop,
        evaluate_config=experiment.evaluate,
        checkpoint_config=experiment.checkpoint,
        step=step,
        evaluate=evaluate,
        batch_at=lambda index: _place(built, prefetch(index)),
        held_out={name: HeldOutBatches(built, rows) for name, rows in built.data.evaluation_batches().items()},
        saver=saver,
        telemetry=telemetry,
        faults=built.faults,
    )
    return loops.train(loop, state, frozen, start=start, evaluation=evaluation)


def _flops_per_token(built: Run) -> float:
    """Of training, for each of the tokens that `tokens_per_step` counts, those of an encoder among them."""
    data = built.experiment.data
    of_decoder = programs.flops_per_token(built.program, data.length, data.encoder_length)
    return of_decoder * data.batch_size * data.length / built.data.tokens_per_step


def _start(built: Run, saver: Saver) -> tuple[int, dict[str, Any], dict[str, Any], dict[str, float], str]:
    """(updates done, state, frozen parameters, the evaluation of that step if made, where they come from)."""
    restored = saver.restore()
    if restored is not None:
        return *restored, f"checkpoint of step {restored[0]}"
    source, taken, origin = built.experiment.checkpoint.init_from, {}, "random parameters"
    if source is not None:
        taken, origin = take(
            source,
            select=built.experiment.checkpoint.init_select,
            layout=built.program.layout,
            tokenizer=built.data.vocabulary.fingerprint,
        )
    saver.begin(source, taken.keys())
    state, frozen = programs.initialize(built.program, seed=built.experiment.seed, taken=taken)
    return 0, state, frozen, {}, origin


def _record(built: Run, start: int) -> None:
    """Writes config, tokenizer and the manifest's entry of this start, before the first step."""
    experiment, workdir = built.experiment, built.workdir
    if not built.processes.primary:
        return
    if not _is_saved(built.data.vocabulary.fingerprint, workdir.tokenizer):
        staged = paths.StagedDirectory(workdir.tokenizer)
        built.data.vocabulary.save(staged.local_path)
        staged.close()
    config = experiments.to_dict(experiment)
    entry = manifest.start_entry(
        data=built.data.fingerprint,
        tokenizer=built.data.vocabulary.fingerprint,
        mesh=dict(built.program.mesh.shape),
        platform=jax.default_backend(),
        devices=jax.device_count(),
        processes=jax.process_count(),
        threads=built.environment.threads,
        resumed_from=start or None,
        changes=built.changes,
    )
    workdir.record_start(config=config, overrides=built.overrides, entry=entry)


def _is_saved(vocabulary: str, folder: str) -> bool:
    """Whether the folder holds the vocabulary of this fingerprint, whole: its settings are written last."""
    settings = paths.join(folder, SETTINGS)
    return paths.exists(settings) and paths.read_json(settings).get("fingerprint") == vocabulary


def _metadata(built: Run) -> dict[str, Any]:
    return {
        "config": experiments.to_dict(built.experiment),
        "provenance": {
            "data": built.data.fingerprint,
            "tokenizer": built.data.vocabulary.fingerprint,
            "revision": manifest.revision(),
            "versions": manifest.versions(),
            "mesh": dict(built.program.mesh.shape),
            "threads": built.environment.threads,
        },
    }


def _summary(built: Run, step: Any, *, origin: str, start: int) -> Mapping[str, Mapping[str, object]]:
    notes = [*built.environment.notes, *(f"changed at this start: {change}" for change in built.changes)]
    return summary.sections(
        built.experiment,
        built.program,
        workdir=built.workdir.root,
        origin=origin,
        start=start,
        data=built.data.describe(built.experiment.loop.steps),
        memory=step.memory_analysis(),
        notes=notes,
    )


def _local_rows(built: Run) -> np.ndarray:
    return addressable_rows(built.program.batch)


def _read_rows(built: Run) -> Any:
    rows = _local_rows(built)
    return lambda index: built.data.rows(index, rows)


def _place(built: Run, local: Mapping[str, np.ndarray]) -> Batch:
    """The sharded arrays of a batch of which this process has read its rows."""
    return global_batch(
        lambda rows: dict(local),
        rows=_local_rows(built),
        arrays=built.program.batch,
    )


class HeldOutBatches:
    """The batches of a held-out set as sharded arrays, from the first at each iteration."""

    def __init__(self, built: Run, held_out: HeldOut):
        self._built, self._held_out = built, held_out

    def __iter__(self) -> Iterator[Batch]:
        rows = _local_rows(self._built)
        for index in range(len(self._held_out)):
            yield _place(self._built, self._held_out.rows(index, rows))
