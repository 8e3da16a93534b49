"""A run outlives what happens to its machines: a step that hangs, fewer devices than before. What it cost is counted.

Kills, and what they cost, are in test_crash.py; signals and notices in tests/training/test_faults.py.
"""

import json
import os
import subprocess
import sys

import pytest

from t5x_like.__main__ import main
from tests.end_to_end.commands import CONFIG, ROOT, rows, train, unfinished

LIMIT = "--config.runtime.phase_seconds.step=5"
SHORT = ("--config.telemetry.tensorboard=False", "--config.loop.steps=12")


def _child(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _spent(workdir, capsys):
    capsys.readouterr()
    assert main(["inspect", str(workdir), "--goodput", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_that_hangs_ends_the_run_with_its_stacks_and_the_next_start_goes_on(tmp_path, capsys):
    workdir = tmp_path / "run"
    command = ("tests.end_to_end.hanging_train", "train", f"--config={CONFIG}", f"--workdir={workdir}", *SHORT, LIMIT)
    done = _child(*command, "--config.checkpoint.every_steps=2")
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("t5x_like: ")]
    assert said == "t5x_like: no progress in phase 'step' for 5 s (config.runtime.phase_seconds.step), step 5"
    for text in (done.stderr, (workdir / "log.txt").read_text()):
        assert "in stuck_in_the_step" in text and "Current thread" in text
    (start,) = _spent(workdir, capsys)["starts"]
    assert start["ended"].startswith("no progress in phase 'step'") and start["seconds"]["steps"] > 4
    assert (start["first_step"], start["last_step"]) == (0, 4)
    assert train(workdir, config=None) == 0
    spent = _spent(workdir, capsys)
    assert spent["lost_steps"] == 0 and spent["seconds"]["lost"] > 4, "the step that hung"


@pytest.mark.slow
def test_a_step_that_hangs_on_one_of_two_processes_ends_both_with_stacks(tmp_path):
    workdir = tmp_path / "run"
    line = ("launch.local", "--processes=2", "--devices=4", "--module=tests.end_to_end.hanging_train", "--", "train")
    done = _child(*line, f"--config={CONFIG}", f"--workdir={workdir}", LIMIT, *SHORT, HANGS_ON="1")
    assert done.returncode == 1
    assert "no progress in phase 'step' for 5 s" in done.stderr
    assert "in stuck_in_the_step" in done.stderr
    assert "in stuck_in_the_step" in (workdir / "log.1.txt").read_text()


def test_a_run_goes_on_in_slices_and_with_half_of_its_devices_and_says_so(finished, tmp_path, capsys):
    two_slices = unfinished(finished, tmp_path)
    before = {row["step"]: row["train/loss"] for row in rows(two_slices) if "train/loss" in row}
    assert train(two_slices, "--config.mesh.slice=-1", "--config.mesh.fsdp=4", config=None) == 0
    assert (
        "another mesh than at the last start: fsdp=8 (8 cpu devices) -> fsdp=4 x slice=2 (8 cpu devices); 1 -> 1 of "
        "the 8 rows of a batch on a device"
    ) in " ".join(capsys.readouterr().out.split())
    workdir = unfinished(two_slices, tmp_path / "again")
    done = _child("t5x_like", "train", f"--workdir={workdir}", JAX_NUM_CPU_DEVICES="4")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert (
        "another mesh than at the last start: fsdp=4 x slice=2 (8 cpu devices) -> fsdp=4 (4 cpu devices); 1 -> 2 of "
        "the 8 rows of a batch on a device; batches and updates stay the same, losses up to rounding"
    ) in shown
    for each in (two_slices, workdir):
        after = {row["step"]: row["train/loss"] for row in rows(each) if "train/loss" in row}
        assert after.keys() == before.keys() and max(after) == 12
        assert [after[step] for step in (11, 12)] == pytest.approx([before[step] for step in (11, 12)], rel=1e-5)
    starts = json.loads((workdir / "manifest.json").read_text())["starts"]
    meshes = [(start["devices"], start["mesh"]["slice"], start["mesh"]["fsdp"]) for start in starts]
    assert meshes == [(8, 1, 8), (8, 2, 4), (4, 1, 4)]


def test_a_mesh_of_fixed_numbers_does_not_shrink_by_itself(finished, tmp_path, capsys):
    workdir = unfinished(finished, tmp_path)
    kept = (workdir / "manifest.json").read_bytes()
    assert train(workdir, "--config.mesh.fsdp=16", config=None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("config.mesh: fsdp=16 = 16, but there are 8 devices; set one axis to -1 to take what is left")
    assert (workdir / "manifest.json").read_bytes() == kept


def test_the_same_devices_are_not_worth_a_line(finished, tmp_path, capsys):
    assert train(unfinished(finished, tmp_path), config=None) == 0
    assert "than at the last start" not in capsys.readouterr().out


def test_a_run_that_was_stopped_and_resumed_counts_both_starts_in_rows_manifest_and_table(finished, tmp_path, capsys):
    workdir = unfinished(finished, tmp_path)
    assert train(workdir, config=None) == 0
    shown = capsys.readouterr().out
    assert "  goodput: " in shown and " over 2 starts, 2 steps lost" in shown
    last = [row for row in rows(workdir) if "train/loss" in row][-1]
    assert last["goodput/starts"] == 2 and 0 < last["goodput/productive"] < 1 and last["goodput/idle"] >= 0
    spent = _spent(workdir, capsys)
    kept = json.loads((workdir / "manifest.json").read_text())["goodput"]
    assert kept == spent and [start["ended"] for start in spent["starts"]] == ["finished", "finished"]
    assert sum(spent["seconds"].values()) == pytest.approx(spent["wall_seconds"], abs=0.02)
    assert main(["inspect", str(workdir), "--goodput"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{workdir}: ") and "% goodput, " in lines[0]
    named = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {"steps", "input", "compile", "restore", "checkpoint", "evaluate", "startup", "prepare", "lost"} <= named
