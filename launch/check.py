"""Checks configs in a child process, before anything is started: what launches runs does not import jax itself.

    problems(runs, devices=64, slices=2)    for devices that are not there
    problems(runs)                          for those of this machine
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from t5x_like.core.errors import UserError


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


def check(runs: Sequence[Run], *, devices: int | None = None, slices: int | None = None) -> list[Verdict]:
    """A verdict on each run. devices: of each run, counted over all slices; None for those of this machine, where the
    models and runs that configs name are looked for too. Takes some seconds, and a second for each other model."""
    asked = {"devices": devices, "slices": slices, "runs": [dataclasses.asdict(run) for run in runs]}
    with tempfile.TemporaryDirectory(prefix="t5x_like-check-") as folder:
        question, answer = (os.path.join(folder, name) for name in ("question.json", "answer.json"))
        with open(question, "w", encoding="utf-8") as file:
            json.dump(asked, file)
        command = [sys.executable, "-m", "launch.check", question, answer]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if done.returncode or not os.path.exists(answer):
            said = done.stderr.decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "nothing"
            raise UserError(f"the check of the config ended with status {done.returncode}; it said last: {last}")
        with open(answer, encoding="utf-8") as file:
            return [Verdict(**{**found, "metrics": tuple(found["metrics"])}) for found in json.load(file)]


def _main(question: str, answer: str) -> None:
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    verdicts = [dataclasses.asdict(verdict) for verdict in _verdicts(**asked)]
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(verdicts, file)


def _verdicts(devices: int | None, slices: int | None, runs: Sequence[dict[str, Any]]) -> list[Verdict]:
    from t5x_like.core import config as bridge
    from t5x_like.core import environment
    from t5x_like.runs.arguments import load_config, section

    loaded: list[Any] = []
    for run in runs:
        try:
            config, overrides = load_config(run["arguments"])
            runtime = bridge.build(environment.RuntimeConfig, section(config, "runtime"), path="config.runtime")
            loaded.append((config, overrides, runtime))
        except UserError as error:
            loaded.append(str(error))
    # Devices are fixed when jax starts: as many as any run needs.
    runtimes = [each[2] for each in loaded if not isinstance(each, str)]
    fakes = devices if devices is not None else max((runtime.fake_devices for runtime in runtimes), default=0)
    platform = "cpu" if fakes else runtimes[0].platform if runtimes else "cpu"
    environment.apply(dataclasses.replace(environment.READING, platform=platform, fake_devices=fakes))

    import jax

    from t5x_like.runs.checking import Checker

    checker = Checker(jax.devices(), slices=slices, there=devices is None)
    found = []
    for run, each in zip(runs, loaded, strict=True):
        if isinstance(each, str):
            found.append(Verdict(each))
            continue
        config, overrides, runtime = each
        own = (runtime.fake_devices or (1 if fakes else None)) if devices is None else None
        try:
            checked = checker.check(config, overrides, workdir=run["workdir"], devices=own)
            found.append(Verdict("", **vars(checked)))
        except UserError as error:
            found.append(Verdict(str(error)))
    return found


if __name__ == "__main__":
    _main(*sys.argv[1:])
