"""Sweeps of real runs: what is checked before the first starts, and a sweep that is killed."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from launch import check, sweep
from launch.sweeps import index
from launch.sweeps.index import DONE

ROOT = pathlib.Path(__file__).resolve().parents[2]
RATE = "config.optim.learning_rate"
TEST = "--config=configs/pretrain/test.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [f"--sweep.{RATE[:-1]}=1,2"],
            r"the member lr-1 \(config.optim.learning_rat=1\): .* did you mean 'learning_rate'",
        ),
        ([f"--sweep.{RATE}=fast"], "the member lr-fast .*: could not convert string to float"),
        (["--sweep.config.seed=1.0,2"], "the member seed-1 .*config.seed=1.0: invalid literal for int"),
        (["--sweep.config.seed=3,3"], "two members with equal points: config.seed=3"),
        (["--sweep.config.loop.steps=5,9", "--halving=2:3"], "steps-5 has 5 and steps-9 9"),
        ([f"--{RATE}=1", f"--sweep.{RATE}=2"], "the member lr-2 .*an override is given twice"),
    ],
)
def test_a_point_that_its_config_does_not_take_is_one_line(capsys, tmp_path, arguments, message):
    assert sweep.main([TEST, f"--workdir={tmp_path / 'sweep'}", *arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1 and not (tmp_path / "sweep").exists()


def test_every_member_is_checked_before_the_first_starts(capsys, tmp_path):
    arguments = ["--config.runtime.fake_devices=4", "--sweep.config.mesh.tensor=1,3"]
    assert sweep.main([TEST, f"--workdir={tmp_path / 'sweep'}", *arguments]) == 2
    assert capsys.readouterr().err == (
        "sweep: the member tensor-3 (config.mesh.tensor=3): config.mesh: tensor=3 = 3 does not divide the 4 devices\n"
    )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("arguments", "problems", "message"),
    [
        (["--sweep.seeds=3"], ["", "no", "no"], "the member seed-1 (config.seed=1): no (and 1 more members)"),
        (
            ["--sweep.seeds=2"],
            ["", ""],
            "the member seed-0 (config.seed=0) and the member seed-1 (config.seed=1) are the",
        ),
        (["--sweep.seeds=1", "--metric=eval/validation/los"], [""], "is not measured by the member seed-0 "),
    ],
)
def test_what_the_check_finds_is_one_line_with_the_member(monkeypatch, capsys, tmp_path, arguments, problems, message):
    config = {"data": {"validation": "0.1"}}
    verdicts = [check.Verdict(problem, 40, ("accuracy", "loss"), config) for problem in problems]
    monkeypatch.setattr(check, "check", lambda runs, place, environment: verdicts)
    assert sweep.main([TEST, f"--workdir={tmp_path / 'sweep'}", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "sweep").exists()


def test_a_config_is_checked_for_devices_that_are_not_here():
    file = "--config=configs/pretrain/llama3_8b.py"
    data = ("--config.data.source=jsonl:gs://bucket/*.jsonl", "--config.data.tokenizer=gs://bucket/tokenizer")
    place = check.Place(devices=64, slices=2, there=False)
    runs = [(file, *data), (file, *data, "--config.mesh.slice=2"), (file, "--config.mesh.slice=2")]
    wrong, right, as_shared = check.check([check.Run(arguments) for arguments in runs], place)
    assert as_shared.problem.startswith("config.data.source=jsonl:REPLACE/*.jsonl is to be filled in")
    assert wrong.problem.startswith("config.mesh.slice=1, but the devices are 2 slices")
    assert right.problem == "" and right.steps > 0 and "loss" in right.metrics


def test_the_programs_of_an_rl_member_are_checked_too():
    right = check.Run(("--config=configs/rl/test.py",))
    base = ("--config.objective.grpo.reference=base", "--config.objective.grpo.kl_coefficient=0.1")
    wrong = check.Run((*right.arguments, *base))
    good, bad = check.check([right, wrong], check.HERE)
    assert good.problem == "" and "without its adapters" in bad.problem


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_killed_sweep_of_real_runs_repeats_no_finished_member(tmp_path, count):
    folder = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "launch.sweep",
        f"--workdir={folder}",
        f"--max_parallel={1 + (count > 2)}",
        "--no_check",
    ]
    first = [TEST, "--config.loop.steps=6", "--config.telemetry.tensorboard=False", f"--sweep.seeds={count}"]
    with open(tmp_path / "output.txt", "wb") as output:
        child = subprocess.Popen([*command, *first], cwd=ROOT, stdout=output, stderr=output)
        wait_for(child, lambda: done(folder) >= count // 2 and (folder / running(folder) / "metrics.jsonl").exists())
        child.kill()
        child.wait()
    finished = {entry.name for entry in index.read(str(folder)) if entry.state == DONE}
    assert len(finished) >= count // 2 and len(finished) < count
    again = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    starts = {path.parent.name: json.loads(path.read_text())["starts"] for path in folder.glob("*/manifest.json")}
    assert len(starts) == count and all(len(starts[name]) == 1 for name in finished)
    assert all(f"{name} starts" not in again.stderr for name in finished)
    for name in starts:
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    table = (folder / "results.md").read_text()
    assert table.count("| 6/6 |") == count and "eval/validation/loss" in table


def done(folder):
    return sum(entry.state == DONE for entry in index.read(str(folder))) if index.exists(str(folder)) else 0


def running(folder):
    return next((entry.name for entry in index.read(str(folder)) if entry.state == "running"), "none")


def wait_for(child, condition):
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)


def test_the_sweep_of_the_first_config_is_one(capsys):
    assert os.path.samefile(ROOT, os.getcwd())
    assert sweep.main(["--config=tiny", "--workdir=absent/rates", "--dry_run", "--no_check"]) == 0
    assert "lr-3e-2-seed-1: --config.optim.learning_rate=0.03, --config.seed=1" in capsys.readouterr().out
