"""A training run from its config to its exit status: what the session, the program, the data and the loop do together.

The order of training itself stands in training/loop.py, what stands around a loop in training/session.py.
"""

import contextlib
import functools
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from t5x_like.core.config import nearest
from t5x_like.core.environment import Environment
from t5x_like.core.errors import UsageError
from t5x_like.data.read.loader import HeldOut, Prefetch, TrainData, open_data
from t5x_like.data.tokenizers.vocabularies import SETTINGS
from t5x_like.data.write.progress import show_progress
from t5x_like.objectives.interface import Batch
from t5x_like.optim.optimizers import describe
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.sharding import addressable_rows, global_batch
from t5x_like.runs import adapters, branch, doctor, elastic, reference_logp, summary
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.program import Program
from t5x_like.runs.roles import check_tokenizers
from t5x_like.runs.train import Experiment, Run
from t5x_like.storage import paths, patterns
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.model_directory import DamagedCheckpoint
from t5x_like.storage.workdir import Workdir
from t5x_like.training import loop as loops
from t5x_like.training.faults import PREEMPTED, Faults
from t5x_like.training.saver import Saver, take
from t5x_like.training.session import Inputs, Request, Session, warn
from t5x_like.training.telemetry import screen

Sources = Mapping[str, Mapping[str, str]]  # by role: source and fingerprint of models that no step holds


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
    with Session(request, experiment.runtime, environment) as session:
        experiment = with_branch(experiment, stored, session)
        programs.check_mesh(experiment, meshes.axis_sizes(experiment.mesh, jax.device_count()))
        session.open_workdir(experiments.to_dict(experiment), overrides=overrides, may_change=experiments.MAY_CHANGE)
        # Built before the data is prepared, which may take long: what is wrong with the config shows first.
        mesh = meshes.make(experiment.mesh)
        session.hold(jax.set_mesh(mesh))
        program = programs.step_program(experiment, mesh)
        note_devices(session, program, rows=experiment.data.batch_size)
        finished = _saver(experiment, program, Checkpoints(session.workdir.checkpoints, read_only=True), {})
        if not request.check and is_finished(session, experiment.loop.steps, finished):
            return 0
        experiments.check_schedule(experiment)
        with session.preparing():
            data = _open_data(experiment, session)
        session.hold(contextlib.closing(data))
        check_tokenizers(program.roles, data.vocabulary.fingerprint)
        _check_best_metric(experiment.checkpoint.best_metric, program, data)
        with session.preparing():
            beside = session.workdir.path("cache")
            cache = experiment.data.cache or beside
            cached = reference_logp.attach(experiment, session, program, data, cache=cache, beside=beside)
        if request.check:
            return _check(experiment, session, program, data)
        return _train(experiment, session, program, data, cached)


def note_devices(session: Session, program: Program, *, rows: int, stays: str = elastic.READ) -> None:
    """Has the start screen say what is other than at the last start of this workdir: the mesh, or what it lies on."""
    starts = session.workdir.manifest()["starts"] if session.processes.primary else []
    now = {
        "mesh": dict(program.mesh.shape),
        "devices": program.mesh.size,
        "processes": session.processes.count,
        "platform": program.mesh.devices.flat[0].platform,
    }
    rules = program.model.rules
    line = elastic.changed(starts[-1], now, rules=rules, rows=rows, stays=stays) if starts else None
    if line:
        session.note(line)


def with_branch(experiment: Run, stored: Mapping[str, Any] | None, session: Session) -> Run:
    """The experiment whose `branch_from` says the very checkpoint, as process 0 finds it at the first start."""
    given = experiment.checkpoint.branch_from
    if given is None or stored is not None:
        return experiment
    found = branch.resolve(given) if session.processes.primary else None
    return branch.replaced(experiment, session.processes.broadcast("branch", found))


def is_finished(session: Session, steps: int, saver: Saver) -> bool:
    """Whether all steps are done and their checkpoint is there and whole; says what it found. `saver` only reads."""
    workdir = session.workdir
    done = workdir.finished_step()
    if done is None or steps > done:
        return False
    try:
        restored = saver.restore()
        found = "is missing" if restored is None or restored[0] < done else ""
    except DamagedCheckpoint:
        found = "is damaged"
    if found:
        warn(
            f"{workdir.root} was finished at step {done}, but the checkpoint of that step {found}; the lost steps are "
            "trained again from the newest that is whole"
        )
        return False
    print(f"{workdir.root} is finished: {done} of {done} steps are done")
    return True


def _open_data(experiment: Experiment, session: Session) -> TrainData:
    """The prepared data; process 0 prepares what is missing while the others wait."""
    processes, workdir = session.processes, session.workdir
    beside = workdir.path("cache")
    cache = experiment.data.cache or beside
    if processes.primary:
        with _saved_tokenizer(experiment.data.tokenizer, workdir) as saved:
            show_progress(experiment.data, cache, tokenizer=saved, beside=beside)
    processes.broadcast("data is prepared", True, timeout=math.inf)
    data = open_data(experiment.data, cache_dir=cache, seed=experiment.seed, beside=beside)
    processes.agree("data fingerprint", data.fingerprint)
    workdir.check_data(data.fingerprint)
    if experiment.model.vocab_size != data.vocabulary.size:
        raise UsageError(
            f"config.model.vocab_size={experiment.model.vocab_size}, but the tokenizer {experiment.data.tokenizer!r} "
            f"has {data.vocabulary.size} tokens; set config.model.vocab_size={data.vocabulary.size}"
        )
    return data


@contextlib.contextmanager
def _saved_tokenizer(named: str, workdir: Workdir) -> Iterator[str]:
    """A local folder with the tokenizer of a run that is resumed, "" where it has none or another is named now."""
    stored = workdir.config()
    if stored is None or stored["data"]["tokenizer"] != named or named == "task":
        yield ""
    elif not paths.exists(paths.join(workdir.tokenizer, SETTINGS)):
        yield ""
    else:
        with paths.local_copy(workdir.tokenizer) as folder:
            yield folder


def _check_best_metric(wanted: str | None, program: Program, data: TrainData) -> None:
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


def _check(experiment: Experiment, session: Session, program: Program, data: TrainData) -> int:
    step, _ = _compile(program, session.faults, evaluates=bool(data.evaluation_batches()))
    told = _told(experiment, session, program, data, origin="not started (--check)", start=0)
    for line in screen(summary.sections(experiment, program, told, memory=step.memory_analysis())):
        print(line)
    print(f"\n{describe(program.optimizer)}")
    return 0


def _train(experiment: Experiment, session: Session, program: Program, data: TrainData, cached: Sources) -> int:
    loop = functools.partial(_loop, experiment, session, program, data, cached)
    outcome = session.run(loop, checkpoint=experiment.checkpoint, steps=experiment.loop.steps)
    return end(experiment, session, outcome)


def end(experiment: Experiment, session: Session, outcome: loops.Outcome) -> int:
    """The exit status of a run whose loop has ended; says how."""
    root = session.workdir.root
    if not outcome.finished:
        warn(f"{root} is saved; start the same command again to go on")
        return PREEMPTED
    if session.processes.primary:
        for line in summary.closing(root, outcome.evaluation, spent=session.account(), plot=experiment.telemetry.plot):
            print(line)
    return 0


def _loop(
    experiment: Experiment,
    session: Session,
    program: Program,
    data: TrainData,
    cached: Sources,
    checkpoints: Checkpoints,
) -> loops.Outcome:
    """Restores or makes the state, compiles, and trains."""
    inputs = Inputs(data.fingerprint, data.vocabulary, dict(program.mesh.shape))
    saver = _saver(experiment, program, checkpoints, session.metadata(inputs), cached)
    with session.ledger.part("restore"):
        start, state, frozen, evaluation, origin = begin(experiment, session, program, saver, inputs)
    check_steps(experiment, session, start)
    session.record_start(inputs, resumed_from=start or None)
    telemetry = session.telemetry(
        experiment.telemetry,
        flops_per_token=_flops_per_token(experiment, program, data),
        tokens_per_step=data.tokens_per_step,
        devices=list(program.mesh.devices.flat),
        total_steps=experiment.loop.steps,
        start_step=start,
    )
    batches = Batches(program, data)
    with telemetry.timed("compile"):
        step, evaluate = _compile(program, session.faults, evaluates=bool(batches.held_out))
    told = _told(experiment, session, program, data, origin=origin, start=start, cached=cached)
    telemetry.summary(summary.sections(experiment, program, told, memory=step.memory_analysis()))
    prefetch = Prefetch(batches.read, ahead=experiment.data.prefetch)
    session.closing(prefetch.close)
    loop = loops.Loop(
        config=experiment.loop,
        evaluate_config=experiment.evaluate,
        checkpoint_config=experiment.checkpoint,
        step=step,
        evaluate=evaluate,
        source=loops.Prepared(lambda index: batches.place(prefetch(index))),
        held_out=batches.held_out,
        saver=saver,
        telemetry=telemetry,
        faults=session.faults,
    )
    return loops.train(loop, state, frozen, start=start, evaluation=evaluation)


def check_steps(experiment: Experiment, session: Session, start: int) -> None:
    """Raises UsageError for a run that is told to end before the step that it has reached."""
    if start > experiment.loop.steps:
        raise UsageError(
            f"config.loop.steps={experiment.loop.steps}, but {session.workdir.root} has a checkpoint of step {start}; "
            f"use at least {start}"
        )


def _saver(
    experiment: Experiment,
    program: Program,
    checkpoints: Checkpoints,
    metadata: Mapping[str, Any],
    cached: Sources = types.MappingProxyType({}),
) -> Saver:
    config = experiment.checkpoint
    return Saver(
        checkpoints,
        parts=program.parts,
        layout=program.layout,
        holds=config.holds,
        metadata=metadata,
        among=[] if config.init_from is None else [config.init_from],
        cached=cached,
    )


def begin(
    experiment: Experiment, session: Session, program: Program, saver: Saver, inputs: Inputs
) -> tuple[int, dict[str, Any], dict[str, Any], dict[str, float], str]:
    """(updates done, state, frozen parameters, the evaluation of that step if made, where they come from)."""
    restored = saver.restore()
    if restored is not None:
        return *restored, f"checkpoint of step {restored[0]}"
    config, taken, origin = experiment.checkpoint, {}, "random parameters"
    tokenizer = inputs.vocabulary.fingerprint
    if config.branch_from is not None:
        return _branch(experiment, session, saver, branch.checkpoint(config.branch_from), inputs)
    source = config.init_from and patterns.one(config.init_from, what="config.checkpoint.init_from=")
    if source is not None:
        stored, layout = adapters.open_merged(source), program.layout
        taken, origin = take(stored, source, select=config.init_select, layout=layout, tokenizer=tokenizer)
    saver.begin(source, taken.keys())
    state, frozen = programs.initialize(program, seed=experiment.seed, taken=taken)
    return 0, state, frozen, {}, origin


def _branch(
    experiment: Experiment, session: Session, saver: Saver, checkpoint: str, inputs: Inputs
) -> tuple[int, dict[str, Any], dict[str, Any], dict[str, float], str]:
    """As `begin`, from a checkpoint of another run."""
    config, tokenizer = experiments.to_dict(experiment), inputs.vocabulary.fingerprint
    changes = branch.changes(checkpoint, config=config, data=inputs.data, tokenizer=tokenizer)
    step, state, frozen, evaluation = saver.branch(checkpoint)
    if step >= experiment.loop.steps:
        raise UsageError(
            f"config.loop.steps={experiment.loop.steps}, but {checkpoint}, which this run branches from, is of step "
            f"{step}; use more than {step}"
        )
    session.branch(checkpoint, changes)
    return step, state, frozen, evaluation, f"checkpoint of step {step} of another run, {checkpoint}"


def _compile(program: Program, faults: Faults, *, evaluates: bool) -> tuple[Any, Any]:
    """The compiled train and evaluation steps; from here on no step waits for the compiler."""
    layout = program.layout
    with faults.phase("compile"):
        step = program.step.lower(layout.state, layout.frozen, program.batch).compile()
        if not evaluates:
            return step, None
        return step, program.evaluate.lower(layout.state["params"], layout.frozen, program.batch).compile()


def _told(
    experiment: Experiment,
    session: Session,
    program: Program,
    data: TrainData,
    *,
    origin: str,
    start: int,
    cached: Sources = types.MappingProxyType({}),
) -> summary.Told:
    said = {name: f"log-probabilities of all pairs, by {found['source']}" for name, found in cached.items()}
    facts = data.describe(experiment.loop.steps) | {"more": said}
    notes = [*session.notes, *doctor.at_start(experiment, program, hosts=jax.process_count())]
    return summary.Told(session.workdir.root, origin=origin, start=start, data=facts, notes=notes)


def _flops_per_token(experiment: Experiment, program: Program, data: TrainData) -> float:
    """Of training, for each of the tokens that `tokens_per_step` counts, those of an encoder among them."""
    rows = experiment.data
    of_decoder = programs.flops_per_token(program, rows.length, rows.encoder_length)
    # Of a pair there are two texts, each with a source of its own where there is an encoder.
    decoded = sum(array.size for name, array in program.batch.items() if name.rpartition("/")[2] == "inputs")
    return of_decoder * decoded / data.tokens_per_step


class Batches:
    """The batches of a run as the sharded arrays that its program takes; a process reads the rows of its devices."""

    def __init__(self, program: Program, data: TrainData):
        self._arrays, self._data = program.batch, data
        self.rows = addressable_rows(program.batch)
        self.held_out: dict[str, Iterable[Batch]] = {
            name: HeldOutBatches(self, rows) for name, rows in data.evaluation_batches().items()
        }

    def read(self, index: int) -> dict[str, np.ndarray]:
        """This process's rows of the training batch `index`, which is that of step index + 1."""
        return self._data.rows(index, self.rows)

    def place(self, local: Mapping[str, np.ndarray]) -> Batch:
        return global_batch(lambda rows: dict(local), rows=self.rows, arrays=self._arrays)


class HeldOutBatches:
    """The batches of a held-out set as sharded arrays, from the first at each iteration."""

    def __init__(self, batches: Batches, held_out: HeldOut):
        self._batches, self._held_out = batches, held_out

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self._held_out)):
            yield self._batches.place(self._held_out.rows(index, self._batches.rows))
