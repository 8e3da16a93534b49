"""A run of reinforcement learning, from its config to its exit status: the session, programs and loop of a training run
(training_run.py) with a source of batches that the policy makes itself (t5x_like/rl)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from t5x_like.core.config import nearest
from t5x_like.core.environment import Environment
from t5x_like.core.errors import UsageError
from t5x_like.data.config import DataConfig
from t5x_like.data.read.source_target import start_id
from t5x_like.data.tokenizers import tokenizer_training, vocabularies
from t5x_like.data.tokenizers.vocabularies import SETTINGS, Vocabulary
from t5x_like.optim.optimizers import describe
from t5x_like.parallel import mesh as meshes
from t5x_like.rl import loop as iterations
from t5x_like.rl import prompts as prompting
from t5x_like.rl.config import RlConfig
from t5x_like.rl.loop import Around, HeldOut, Iterations, Programs
from t5x_like.rl.prompts import HELD_OUT_SEED, Encoder, Generated, Listed, Prompts, Text
from t5x_like.rl.rewards import Rewards
from t5x_like.rl.rollout import end_ids
from t5x_like.rl.rows import RowShape
from t5x_like.rl.verifiers import Named
from t5x_like.runs import branch, doctor, elastic, rl_program, rl_resume, sections, summary, training_run
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.program import Program
from t5x_like.runs.rl_program import RlExperiment, RlPrograms
from t5x_like.runs.roles import check_tokenizers
from t5x_like.storage import paths
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.training import loop as loops
from t5x_like.training.saver import Saver
from t5x_like.training.session import Inputs, Request, Session, warn
from t5x_like.training.telemetry import screen

MAY_CHANGE = sections.may_change(RlExperiment)
VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Functions:
    """Of the config file: what a config stores of each -> the function, and where it stands."""

    found: Mapping[str, Callable[..., Any]]
    places: Mapping[str, Named]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a run asks its policy: prompts to train on and held-out ones, as tokens of a vocabulary."""

    vocabulary: Vocabulary
    encoder: Encoder
    prompts: Prompts
    held_out: tuple[Text, ...]
    facts: Mapping[str, Any]  # for the start screen

    @property
    def fingerprint(self) -> str:
        return self.prompts.fingerprint


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The train step, and what makes its batches."""

    step: Any
    programs: Programs
    rows: RowShape


def run(
    request: Request,
    *,
    config: Mapping[str, Any],
    functions: Functions,
    overrides: Mapping[str, Any],
    stored: Mapping[str, Any] | None,
    environment: Environment,
) -> int:
    """The exit status of a run, or of its `--check`."""
    experiment = experiments.built(RlExperiment, config, overrides=overrides, stored=stored)
    _check_functions(experiment.rl, functions)
    with Session(request, experiment.runtime, environment) as session:
        experiment = training_run.with_branch(experiment, stored, session)
        sizes = meshes.axis_sizes(experiment.mesh, jax.device_count())
        programs.check_mesh(experiment, sizes)
        rl_program.check_rows(experiment, sizes)
        session.open_workdir(experiments.to_dict(experiment), overrides=overrides, may_change=MAY_CHANGE)
        mesh = meshes.make(experiment.mesh)
        session.hold(jax.set_mesh(mesh))
        program = programs.step_program(experiment, mesh)
        training_run.note_devices(session, program, rows=experiment.rows, stays=elastic.DRAWN)
        saver = _saver(experiment, program, Checkpoints(session.workdir.checkpoints, read_only=True), {})
        if not request.check and training_run.is_finished(session, experiment.loop.steps, saver):
            return 0
        experiments.check_schedule(experiment)
        with session.preparing():
            asked = _asked(experiment, functions, session)
            rewards = session.hold(Rewards(experiment.rl, functions.places, warn=warn))
        check_tokenizers(program.roles, asked.vocabulary.fingerprint)
        _check_best_metric(experiment, rewards, asked)
        return (_check if request.check else _train)(experiment, session, program, asked, rewards)


def _check_functions(config: RlConfig, functions: Functions) -> None:
    """A function that only a stored config names is no function."""
    named = {"generate": config.generate} | {
        f"rewards.{name}.function": r.function for name, r in config.rewards.items()
    }
    for field, name in named.items():
        if name is not None and name not in functions.found:
            raise UsageError(
                f"config.rl.{field}={name!r} is a function of a config file, and a stored config holds no code; give "
                "--config=FILE with --workdir, and set functions in the file itself"
            )


def _asked(experiment: RlExperiment, functions: Functions, session: Session) -> Asked:
    data, config, seed = experiment.data, experiment.rl, experiment.seed
    vocabulary = _vocabulary(data, session)
    if experiment.model.vocab_size != vocabulary.size:
        raise UsageError(
            f"config.model.vocab_size={experiment.model.vocab_size}, but the tokenizer {data.tokenizer!r} has "
            f"{vocabulary.size} tokens; set config.model.vocab_size={vocabulary.size}"
        )
    encoder = Encoder(vocabulary, rl_program.prompt_room(experiment), experiment.data.encoder_length > 0, data)
    drop = data.truncate.rule == "drop"
    if config.generate is not None:
        function = functions.found[config.generate]
        prompts: Prompts = Generated(function, seed, config.generate)
        others = Generated(function, HELD_OUT_SEED, config.generate)
        held_out = [others.at(index) for index in range(config.held_out)]
        # A later prompt that has no room ends the run; the first ones say so before anything is compiled.
        for text in (*held_out, *(prompts.at(index) for index in range(config.prompts))):
            encoder.ids(text)
        source, count, left_out = config.generate, "any number of", 0
    else:
        report = warn if session.processes.primary else _silent
        read = prompting.read(data, data.source, where="config.data.source", report=report)
        texts = list(prompting.fitting(read, encoder, drop=drop))
        prompts = Listed(texts, seed, prompting.digest(texts))
        others = (
            prompting.read(data, data.validation, where="config.data.validation", report=report)
            if data.validation
            else []
        )
        held_out = list(prompting.fitting(others, encoder, drop=drop))[: config.held_out or None]
        source, count, left_out = data.source, str(len(texts)), len(read) - len(texts)
    session.processes.agree("prompts", prompts.fingerprint)
    session.workdir.check_data(prompts.fingerprint)
    facts = {
        "prompts": f"{source}: {count} prompts" + (f", {left_out} too long and left out" if left_out else ""),
        "held out": f"{len(held_out)} prompts",
    }
    return Asked(vocabulary, encoder, prompts, tuple(held_out), facts)


def _silent(line: str) -> None:
    del line


def _vocabulary(data: DataConfig, session: Session) -> Vocabulary:
    """That of the workdir where a run goes on with the tokenizer that it began with, else the one that is named."""
    if data.tokenizer == "task" or tokenizer_training.parse(data.tokenizer, where="config.data.tokenizer") is not None:
        raise UsageError(
            f"config.data.tokenizer={data.tokenizer!r}: prompts are read with the tokenizer of the model; name its "
            "folder, DIR/tokenizer of config.checkpoint.init_from=DIR"
        )
    workdir, stored = session.workdir, session.workdir.config()
    saved = stored is not None and stored["data"]["tokenizer"] == data.tokenizer
    place = data.tokenizer
    if saved and paths.exists(paths.join(workdir.tokenizer, SETTINGS)):
        place = workdir.tokenizer
    if place == "bytes":
        return vocabularies.load(place).with_extra_ids(data.extra_ids)
    with paths.local_copy(place) as folder:
        return vocabularies.load(folder).with_extra_ids(data.extra_ids)


def _check_best_metric(experiment: RlExperiment, rewards: Rewards, asked: Asked) -> None:
    wanted = experiment.checkpoint.best_metric
    if wanted is None:
        return
    measured = ["reward", *(f"reward/{name}" for name in rewards.names), "length_mean", "stopped_by_length"]
    names = [f"eval/{VALIDATION}/{name}" for name in measured] if asked.held_out else []
    if wanted not in names:
        known = nearest(wanted, names) if names else "nothing is held out (config.rl.held_out)"
        raise UsageError(f"config.checkpoint.best_metric={wanted!r} is no result of an evaluation; {known}")


def _saver(experiment: RlExperiment, program: Program, checkpoints: Checkpoints, metadata: Mapping[str, Any]) -> Saver:
    buffers = iterations.empty(experiment.rl, list(experiment.rl.rewards))
    layout = rl_program.with_rollouts(program, buffers)
    config = experiment.checkpoint
    among = [] if config.init_from is None else [config.init_from]
    return Saver(checkpoints, parts=program.parts, layout=layout, holds=config.holds, metadata=metadata, among=among)


def _check(experiment: RlExperiment, session: Session, program: Program, asked: Asked, rewards: Rewards) -> int:
    with session.faults.phase("compile"):
        compiled = compile_programs(experiment, program, asked)
    told = _told(experiment, session, asked, program, origin="not started (--check)", start=0)
    for line in screen(summary.sections(experiment, program, told, memory=compiled.step.memory_analysis())):
        print(line)
    print(f"\n{describe(program.optimizer)}")
    return 0


def _train(experiment: RlExperiment, session: Session, program: Program, asked: Asked, rewards: Rewards) -> int:
    loop = functools.partial(_loop, experiment, session, program, asked, rewards)
    outcome = session.run(loop, checkpoint=experiment.checkpoint, steps=experiment.loop.steps)
    return training_run.end(experiment, session, outcome)


def _loop(
    experiment: RlExperiment,
    session: Session,
    program: Program,
    asked: Asked,
    rewards: Rewards,
    checkpoints: Checkpoints,
) -> loops.Outcome:
    inputs = Inputs(asked.fingerprint, asked.vocabulary, dict(program.mesh.shape))
    saver = _saver(experiment, program, checkpoints, session.metadata(inputs))
    with session.ledger.part("restore"):
        start, state, frozen, evaluation, origin = training_run.begin(experiment, session, program, saver, inputs)
    training_run.check_steps(experiment, session, start)
    rollouts = _pending(experiment, session, inputs, start, state.pop("rollouts", None))
    session.record_start(inputs, resumed_from=start or None)
    telemetry = session.telemetry(
        experiment.telemetry,
        flops_per_token=None,  # the time of a step holds rollouts too
        tokens_per_step=rl_program.tokens_per_step(experiment),
        devices=list(program.mesh.devices.flat),
        total_steps=experiment.loop.steps,
        start_step=start,
    )
    with telemetry.timed("compile"), session.faults.phase("compile"):
        compiled = compile_programs(experiment, program, asked)
    told = _told(experiment, session, asked, program, origin=origin, start=start)
    telemetry.summary(summary.sections(experiment, program, told, memory=compiled.step.memory_analysis()))
    around = Around(telemetry.timed, lambda: session.faults.enter("step"), _share(session))
    source = iterations_of(experiment, compiled, asked, rewards, around)
    if rollouts is not None:
        source.restore(rollouts)
    held_out = {VALIDATION: HeldOut(asked.held_out, compiled.programs.answer.shape.rows)} if asked.held_out else {}
    loop = loops.Loop(
        config=experiment.loop,
        evaluate_config=experiment.evaluate,
        checkpoint_config=experiment.checkpoint,
        step=compiled.step,
        evaluate=source.evaluate,
        source=source,
        held_out=held_out,
        saver=saver,
        telemetry=telemetry,
        faults=session.faults,
    )
    return loops.train(loop, state, frozen, start=start, evaluation=evaluation)


def _pending(experiment: RlExperiment, session: Session, inputs: Inputs, step: int, rollouts: Any) -> Any:
    """The answers of a checkpoint, None where they are not those of this run as it is now: they are drawn anew."""
    if rollouts is None or not step:
        return rollouts
    checkpoint, other = paths.join(session.workdir.checkpoints, str(step)), experiment.checkpoint.branch_from
    branched = other is not None and not paths.exists(checkpoint)
    if other is not None and branched:
        checkpoint = branch.checkpoint(other)
    changed = rl_resume.changes(
        checkpoint,
        config=experiments.to_dict(experiment),
        data=inputs.data,
        tokenizer=inputs.vocabulary.fingerprint,
        branch=branched,
    )
    if not changed:
        return rollouts
    if rl_resume.pending(checkpoint, step) and session.processes.primary:
        warn(f"the answers that {checkpoint} holds are drawn anew, since they followed from: {'; '.join(changed)}")
    return None


def _share(session: Session) -> Callable[[str, Any], Any]:
    """Others wait for as long as process 0 judges answers; what they wait for is watched there."""

    def share(name: str, value: Any) -> Any:
        if session.processes.primary:
            return session.processes.broadcast(name, value)
        with session.faults.phase("prepare"):
            return session.processes.broadcast(name, value, timeout=math.inf)

    return share


def _row_shape(experiment: RlExperiment, program: Program, vocabulary: Vocabulary) -> RowShape:
    data = experiment.data
    return RowShape(
        length=data.length,
        source=data.encoder_length,
        start=start_id(data.start_token, vocabulary) if data.encoder_length else 0,
        judge=rl_program.judge_start(program, vocabulary),
        end=vocabulary.eos_id,
    )


def iterations_of(
    experiment: RlExperiment, compiled: Compiled, asked: Asked, rewards: Rewards, around: Around
) -> Iterations:
    """The source of the batches of a run."""
    return Iterations(
        experiment.rl,
        compiled.programs,
        asked.prompts,
        asked.encoder,
        rewards,
        rows=compiled.rows,
        seed=experiment.seed,
        around=around,
    )


def compile_programs(experiment: RlExperiment, program: Program, asked: Asked) -> Compiled:
    """Every program of the run; from here on nothing waits for the compiler."""
    ends = end_ids(experiment.rl.end_tokens, asked.vocabulary)
    made: RlPrograms = rl_program.rl_programs(
        experiment, program, end_ids=ends, source_end=asked.vocabulary.eos_id is not None
    )
    layout = program.layout
    parameters = (layout.state["params"], layout.frozen)
    step = program.step.lower(layout.state, layout.frozen, program.batch).compile()

    def compiled(rollout: Any) -> Any:
        run = rollout.run.lower(*parameters, rollout.batch, rollout.iteration).compile()
        return dataclasses.replace(rollout, run=run)

    several = rl_program.updates(experiment) > 1
    found = Programs(
        mesh=program.mesh,
        sample=compiled(made.sample),
        answer=compiled(made.answer) if asked.held_out else made.answer,
        score=made.score.lower(*parameters, made.scored).compile() if several else made.score,
        reference=made.reference and made.reference.lower(*parameters, made.scored).compile(),
        reward=made.reward and made.reward.lower(*parameters, made.judged).compile(),
        batch=program.batch,
        scored=made.scored,
        judged=made.judged,
    )
    return Compiled(step, found, _row_shape(experiment, program, asked.vocabulary))


def _told(
    experiment: RlExperiment, session: Session, asked: Asked, program: Program, *, origin: str, start: int
) -> summary.Told:
    vocabulary, tokens = asked.vocabulary, rl_program.tokens_per_step(experiment)
    data = {
        "fingerprint": asked.fingerprint,
        "tokenizer": {"kind": vocabulary.kind, "size": vocabulary.size, "loses": vocabulary.loses},
        "components": {},
        "validation": {},
        "unevaluated": {},
        "tokens_per_step": tokens,
        "tokens_to_come": experiment.loop.steps * tokens,
        "more": {**asked.facts, **rl_program.facts(experiment)},
    }
    notes = [*session.notes, *doctor.at_start(experiment, program, hosts=jax.process_count())]
    return summary.Told(session.workdir.root, origin=origin, start=start, data=data, notes=notes)
