"""Many runs of one config: a grid, random or Sobol points, seeds; here or on a cluster; with a table and pictures.

    python -m launch.sweep --config=configs/pretrain/test.py --workdir=runs/rates --max_parallel=2
    python -m launch.sweep --config=tiny --workdir=runs/rates --sweep.config.optim.learning_rate=1e-3,3e-3
    python -m launch.sweep --workdir=runs/rates --resume            goes on after any end
    python -m launch.sweep --workdir=runs/rates --retry=lr-1e-3     starts a member that failed, alone
    python -m launch.sweep --workdir=runs/rates --results           writes the results of what there is
    python -m launch.sweep --target=gke --config=... --workdir=gs://BUCKET/rates --topology=v5p:4x4x4 --image=...

What `sweep(add)` of the config file adds, and what --sweep... flags say, is described in launch/sweeps/reading.py.
Every member is checked before the first starts; its workdir lies in the sweep's. docs/sweeps.md says more.
Exit status: 0 all done or submitted, 1 members failed, 2 wrong use, 75 asked to stop: members have saved.
"""

import argparse
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from launch import flags
from launch import job as jobs_of
from launch.job import PREEMPTED, Job
from launch.sweeps import checks, elsewhere, halving, here, index, members, reading, report
from launch.sweeps.index import FAILED, RUNNING, WAITING, Index, Settings
from launch.sweeps.pool import Pool
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.runs.arguments import split_config
from t5x_like.storage import lock, paths

TARGETS = ("local", "slurm", "gke", "xpk", "gcloud", "sky")
INTERRUPTED = 130
_OWN = (
    "target",
    "max_parallel",
    "resume",
    "retry",
    "results",
    "metric",
    "goal",
    "halving",
    "gpus_each",
    "dry_run",
    "no_check",
)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        say(str(error))
        return error.exit_status
    except KeyboardInterrupt:  # before the first member starts; later a signal asks the members to save
        say("interrupted")
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    sweep_arguments, others = reading.split(arguments)
    config, others = split_config(others)
    options = _parse(others, begins=bool(config))
    folder = paths.normal(options.pop("workdir"))
    asked = argparse.Namespace(**{name: options.pop(name) for name in _OWN})
    if asked.results:
        return _show(index.read(folder), asked)
    before = b"" if asked.dry_run else index.stamp(folder)
    retrying = bool(asked.retry)
    if asked.resume or retrying:
        found = _resumed(folder, config, sweep_arguments, options, asked)
    else:
        found = _new(folder, config, sweep_arguments, options, asked)
    if retrying and not asked.retry:
        say("no member has failed; --resume goes on with those that have not ended")
        return _show(found, asked)
    schedules = checks.settle(found)
    jobs = _jobs(found)
    if found.settings.target != "local":
        elsewhere.rehearse(found, jobs, elsewhere.launcher(found.settings.target))
    if not asked.no_check:
        checks.check_members(found, jobs)
    if asked.dry_run:
        return _print(found, jobs)
    paths.make_directory(found.folder)
    with lock.locked(found.folder):
        if index.stamp(found.folder) != before:  # by a sweep that ran while this one was checked
            raise UserError(f"{index.path_of(found.folder)} has changed meanwhile; look at --results, and start again")
        found.write()
        return (_here if found.settings.target == "local" else _elsewhere)(found, jobs, schedules, asked)


def _parse(arguments: Sequence[str], *, begins: bool) -> dict[str, Any]:
    given = [each.partition("=")[2] for each in arguments if each.startswith("--target=")]
    target = given[-1] if given else "local" if begins else _recorded_target(arguments)
    if target not in TARGETS:
        raise UsageError(f"--target={target} is unknown; {nearest(target, TARGETS)}")
    parser: Any = flags.parser(target, __doc__)
    parser.prog = "python -m launch.sweep"
    parser.other_flags = ("--config", "--sweep")
    add = parser.add_argument
    add("--target", default=target, help="where the members run: " + ", ".join(TARGETS))
    add("--max_parallel", type=int, metavar="N", help="members at once (1 here, all on a cluster)")
    add("--gpus_each", type=int, metavar="N", help="GPUs of each member here, those beside it have others")
    add("--resume", action="store_true", help="go on with the sweep in --workdir; with --config, and new members")
    add(
        "--retry",
        action="append",
        default=[],
        metavar="NAME",
        help="start this member, which failed or was stopped early, alone; failed: all that failed",
    )
    add("--results", action="store_true", help="write table and plots of what there is, and start nothing")
    add("--metric", default="", help="what members are judged by, such as eval/validation/loss (what there is)")
    add("--goal", default="", choices=("min", "max"), help="whether less or more of it is better (by its name)")
    add("--halving", default="", metavar="SHARE:STEPS", help="2:100: half go on after 100 steps, a quarter after 200")
    options = vars(parser.parse_args(arguments))
    if "workdir" not in options:
        raise UsageError("--workdir is missing; give the folder of the sweep, such as --workdir=runs/rates")
    for name, least in (("max_parallel", 1), ("gpus_each", 0)):
        if options[name] is not None and options[name] < least:
            raise UsageError(f"--{name}={options[name]} should be at least {least}")
    return options


def _recorded_target(arguments: Sequence[str]) -> str:
    """That of the sweep which is there already; its flags are those of its target."""
    given = [each.partition("=")[2] for each in arguments if each.startswith("--workdir=")]
    folder = paths.normal(given[-1]) if given else ""
    return index.read(folder).settings.target if folder and index.exists(folder) else "local"


def _new(
    folder: str, config: Sequence[str], sweep: Sequence[str], options: Mapping[str, Any], asked: argparse.Namespace
) -> Index:
    if not (asked.dry_run and paths.is_remote(folder)):  # which needs no network
        _check_empty(folder)
    if asked.halving and asked.target != "local":
        raise UsageError(
            f"--halving={asked.halving} is for --target=local: only here it is known when a rung has ended"
        )
    settings = Settings(
        config=tuple(config),
        target=asked.target,
        launch=dict(options),
        metric=asked.metric,
        goal=asked.goal,
        halving=halving.parse(asked.halving) if asked.halving else None,
        max_parallel=asked.max_parallel,
        gpus_each=asked.gpus_each or 0,
    )
    found = Index(folder, settings, [], [])
    for member in members.members(reading.read(config, sweep)):
        found.add(member)
    return found


def _check_empty(folder: str) -> None:
    if index.exists(folder):
        raise UsageError(f"{folder} holds a sweep already; go on with it by --resume, or give another --workdir")
    ours = (lock.LOCAL_NAME, lock.REMOTE_NAME)
    unfinished = f"{index.NAME}.tmp."  # of a sweep that was killed as it wrote its index for the first time
    names = paths.list_names(folder)
    foreign = [name for name in names if name not in ours and not name.startswith(unfinished)]
    if foreign:
        raise UsageError(f"{folder} holds {foreign[0]} and no sweep; give a new or empty --workdir")


def _resumed(
    folder: str, config: Sequence[str], sweep: Sequence[str], options: Mapping[str, Any], asked: argparse.Namespace
) -> Index:
    """The sweep of the folder, with what is given anew: flags, and members that its definition has more."""
    found = index.read(folder)
    before = found.settings
    if asked.target != before.target:
        raise UsageError(f"--target={asked.target}, but {folder} is a sweep of --target={before.target}; leave it out")
    if asked.halving and halving.parse(asked.halving) != before.halving:
        raise UsageError(f"--halving={asked.halving} is not what the sweep was started with; leave it out")
    if config and tuple(config) != before.config:
        raise UsageError(
            f"{folder} is a sweep of {' '.join(before.config)}, not of {' '.join(config)}; use another --workdir"
        )
    if sweep and not config:
        raise UsageError(f"{sweep[0]} needs --config=FILE too; without both, the members of the index go on")
    found.settings = dataclasses.replace(
        before,
        launch={**before.launch, **options},
        metric=asked.metric or before.metric,
        goal=asked.goal or before.goal,
        max_parallel=asked.max_parallel or before.max_parallel,
        gpus_each=before.gpus_each if asked.gpus_each is None else asked.gpus_each,
    )
    if config:
        count = len(found)
        for member in members.members(reading.read(config, sweep), [entry.member for entry in found]):
            found.add(member)
        if len(found) > count and before.halving:
            raise UsageError("a sweep with --halving takes no new members: those that are there have been compared")
    if "failed" in asked.retry:
        named = [name for name in asked.retry if name != "failed"]
        asked.retry = [*named, *(entry.name for entry in found if entry.state == FAILED and entry.name not in named)]
    for name in asked.retry:
        if name not in found:
            raise UsageError(f"--retry={name} is no member of {folder}; {nearest(name, found.names)}")
    return found


def _jobs(found: Index) -> dict[str, Job]:
    """The job of each member. Raises UsageError, with the member, for an override that its config does not take."""
    settings, folder = found.settings, found.folder
    prefix = str(settings.launch.get("name", "")) or jobs_of.name_of(folder)
    here_alone = settings.target == "local"
    if not here_alone and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", prefix):
        given = f"--name={prefix}" if settings.launch.get("name") else f"the folder name {paths.base_name(folder)}"
        raise UsageError(f"{given} cannot begin the names of jobs; give --name=NAME of a-z, 0-9 and -, a letter first")
    jobs = {}
    for entry in found:
        config = (*settings.config, *entry.member.overrides)
        name = entry.name if here_alone else members.job_name(prefix, entry.name, folder)
        own = {"name": name, "workdir": found.workdir(entry.name)}
        try:
            jobs[entry.name] = flags.describe(config, {**settings.launch, **own}, target=settings.target)
        except UserError as error:
            raise UsageError(f"{entry.member.described}: {error}") from None
    return jobs


def _print(found: Index, jobs: Mapping[str, Job]) -> int:
    if found.settings.target != "local":
        print(f"# the first of {len(found)} members:")
        launch = elsewhere.launcher(found.settings.target)
        launch(flags.Asked(jobs[found.names[0]], dry_run=True, check=False))
    for entry in found:
        print(f"{entry.name}: {', '.join(entry.member.overrides)}")
        print(f"  {shlex.join(('python', *jobs[entry.name].arguments))}")
    print(f"{len(found)} members; --dry_run: nothing was started")
    return 0


def _here(found: Index, jobs: Mapping[str, Job], schedules: Mapping[str, int], asked: argparse.Namespace) -> int:
    problem = ""
    with Pool(found.settings.max_parallel or 1, found.settings.gpus_each) as pool:
        for entry in found:
            if entry.state == RUNNING:  # of a sweep that was killed
                found.change(entry.name, state=WAITING)
        runs = here.Here(found, jobs, schedules, int(found.settings.launch.get("max_restarts", 0)), say)
        try:
            if asked.retry:
                runs.retry(asked.retry, pool)
            else:
                runs.run(pool)
        except UsageError as error:  # nothing to decide by: the table shows why, if the metric is one
            problem = str(error)
        stopped = pool.asked
    status = _show(found, asked)
    if stopped:
        say(f"asked to stop; {_again(found)} --resume goes on")
        return PREEMPTED
    if problem:
        say(problem)
    return 1 if problem else status


def _elsewhere(found: Index, jobs: Mapping[str, Job], _: Mapping[str, int], asked: argparse.Namespace) -> int:
    for name in asked.retry:
        found.change(name, state=WAITING)
    launch = elsewhere.launcher(found.settings.target)
    names = asked.retry or found.names
    if asked.retry:
        elsewhere.say_ends(found, jobs, names, launch, say=say)
    if not elsewhere.submit(found, jobs, names, launch, at_once=found.settings.max_parallel, say=say):
        say(f"asked to stop; what was submitted runs on, and {_again(found)} --resume submits the rest")
        return PREEMPTED
    which = f"{', '.join(names)} submitted" if asked.retry else f"all {len(found)} members are submitted"
    say(f"{which}; {_again(found)} --results shows how far they are")
    return 0


def _show(found: Index, asked: argparse.Namespace) -> int:
    """Writes table and plots, prints the table, names what failed."""
    _tell(report.write(found, metric=asked.metric, goal=asked.goal), sys.stdout)
    failed = [entry for entry in found if entry.state == FAILED]
    for entry in failed:
        say(f"{entry.name} failed: {entry.said}; {_again(found)} --retry={entry.name} starts it alone")
    return 1 if failed else 0


def _again(found: Index) -> str:
    return f"python -m launch.sweep --workdir={found.folder}"


def say(line: str) -> None:
    _tell(f"sweep: {line}", sys.stderr)


def _tell(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:  # the terminal has gone, which is no reason to leave members that save
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
