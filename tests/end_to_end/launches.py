"""Runs of two processes for the tests, and how far they are from those of one."""

import json
import os
import pathlib
import subprocess
import sys
import time

from tests.end_to_end.commands import ROOT


class Launch:
    """Two processes of a command under launch/local.py, their output and the rows they read of training data."""

    status: int
    losses: dict[int, float]
    saved: list[str]
    resumed: int
    seconds: float

    def __init__(self, folder: pathlib.Path, *arguments: str, command: str = "train", grace: float = 20) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.workdir = folder, folder / "run"
        line = [sys.executable, "-m", "launch.local", "--processes=2", "--devices=4", f"--grace={grace}"]
        line += ["--module=tests.end_to_end.recording_train", "--", command, f"--workdir={self.workdir}"]
        with open(folder / "output.txt", "wb") as output:
            self.child = subprocess.Popen(
                [*line, *arguments],
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "ROWS": str(folder)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    def finish(self, seconds: float = 150) -> int:
        try:
            return self.child.wait(seconds)
        finally:
            self.child.kill()

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while len(losses(self.workdir)) < step:
            assert time.monotonic() < deadline and self.child.poll() is None, self.output
            time.sleep(0.02)

    def rows(self, process: int) -> dict[int, list[int]]:
        lines = (self.folder / f"{process}.jsonl").read_text().splitlines()
        return {step: rows for step, rows in map(json.loads, lines)}


def losses(workdir: pathlib.Path, name: str = "train/loss") -> dict[int, float]:
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return {row["step"]: row[name] for row in rows if name in row}


def differences(found: dict[int, float], expected: dict[int, float]) -> list[float]:
    """Relative differences at the steps of `found`, in order."""
    assert found.keys() <= expected.keys()
    assert len({found[step] for step in found}) == len(found) > 1, "the losses move"
    return [abs(found[step] - expected[step]) / abs(expected[step]) for step in sorted(found)]
