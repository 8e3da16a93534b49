"""Checks configs in a child process, before anything is started: what launches runs does not import jax itself.

check(runs, place_of(job, target=...)) for the devices of a job, check(runs, HERE) for those of this machine.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from launch.job import Job
from t5x_like.core.errors import UsageError, UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """The devices of a run. devices: over all slices and processes, None for those that each of `processes` finds.

    slices: of TPUs, None where there are none. there: models and runs that a config names are read from here too.
    """

    devices: int | None = None
    slices: int | None = None
    processes: int = 1
    there: bool = True


HERE = Place()


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its `--config=FILE --config.a.b=VALUE` arguments and its workdir, "" where that cannot be read here."""

    arguments: tuple[str, ...]
    workdir: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """problem: one line, "" where the run could start. steps, metrics and config are of one that could."""

    problem: str
    steps: int = 0
    metrics: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def place_of(job: Job, *, target: str = "") -> Place:
    """Where a job of a cluster will run. target: slurm has nodes, whatever TPUs a config file names for others."""
    if job.topology and target != "slurm":
        return Place(job.slice.devices * job.slices, job.slices, there=False)
    slurm = job.slurm
    if slurm.gpus_per_node:
        return Place(slurm.nodes * slurm.gpus_per_node, there=False)
    return Place(processes=slurm.nodes * slurm.processes_per_node, there=False)


def check_job(job: Job) -> None:
    """Raises UserError, in one line, where the config could not start on the devices of its job."""
    [verdict] = check([Run(job.config)], place_of(job))
    if verdict.problem:
        raise UsageError(verdict.problem)


def check(runs: Sequence[Run], place: Place, environment: Mapping[str, str] | None = None) -> list[Verdict]:
    """A verdict on each run. Takes some seconds, and one more for each run whose programs have other shapes.

    environment: variables that the runs will have beside ours.
    """
    asked = {"place": dataclasses.asdict(place), "runs": [dataclasses.asdict(run) for run in runs]}
    with tempfile.TemporaryDirectory(prefix="t5x_like-check-") as folder:
        question, answer = (os.path.join(folder, name) for name in ("question.json", "answer.json"))
        with open(question, "w", encoding="utf-8") as file:
            json.dump(asked, file)
        command = [sys.executable, "-m", "launch.check", question, answer]
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode or not os.path.exists(answer):
            said = done.stderr.decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "nothing"
            raise UserError(f"the check of the config ended with status {done.returncode}; it said last: {last}")
        with open(answer, encoding="utf-8") as file:
            return [Verdict(**{**found, "metrics": tuple(found["metrics"])}) for found in json.load(file)]


def _main(question: str, answer: str) -> None:
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    verdicts = [dataclasses.asdict(verdict) for verdict in _verdicts(Place(**asked["place"]), asked["runs"])]
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(verdicts, file)


def _verdicts(place: Place, runs: Sequence[dict[str, Any]]) -> list[Verdict]:
    loaded = [_load(run["arguments"]) for run in runs]
    runtimes = [each[2] for each in loaded if not isinstance(each, str)]
    if not runtimes:
        return [Verdict(str(each)) for each in loaded]

    def own(runtime: Any) -> int | None:
        """How many devices a run of this runtime has; None for all that jax finds here."""
        if place.devices is not None:
            return place.devices
        alone = place.there and place.processes == 1 and not runtime.fake_devices
        return None if alone else max(runtime.fake_devices, 1) * place.processes

    from t5x_like.core import environment

    # Devices are fixed when jax starts: as many as any run needs, and a run without fakes of its own has the first.
    fakes = max(own(runtime) or 0 for runtime in runtimes)
    platform = "cpu" if fakes else runtimes[0].platform
    environment.apply(dataclasses.replace(environment.READING, platform=platform, fake_devices=fakes))

    import jax

    from t5x_like.runs.checking import Checker

    checker = Checker(jax.devices(), slices=place.slices, there=place.there)
    found = []
    for run, each in zip(runs, loaded, strict=True):
        if isinstance(each, str):
            found.append(Verdict(each))
            continue
        config, overrides, runtime = each
        devices = own(runtime) or (1 if fakes else None)
        try:
            checked = checker.check(config, overrides, workdir=run["workdir"], devices=devices)
            found.append(Verdict("", **vars(checked)))
        except Exception as error:  # whatever it is, it is told with its run, and ends the check of no other
            found.append(Verdict(_told(error)))
    return found


def _told(error: Exception) -> str:
    """An error in one line: what a user is meant to read as it is, a defect with its type."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'nothing said')}"


def _load(arguments: Sequence[str]) -> Any:
    """(config, overrides, its runtime), or what is wrong with them."""
    from t5x_like.core import config as bridge
    from t5x_like.core import environment
    from t5x_like.runs.arguments import load_config, section

    try:
        config, overrides = load_config(arguments)
        return (
            config,
            overrides,
            bridge.build(environment.RuntimeConfig, section(config, "runtime"), path="config.runtime"),
        )
    except Exception as error:
        return _told(error)


if __name__ == "__main__":
    _main(*sys.argv[1:])
