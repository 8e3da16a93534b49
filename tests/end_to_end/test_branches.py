"""A run goes on longer than its schedule, or branches from a checkpoint of another run: same bits, same batches."""

import json
import pathlib
import shutil

import pytest

from t5x_like.__main__ import main
from t5x_like.core.metrics import is_measurement

ROOT = pathlib.Path(__file__).resolve().parents[2]
LINE = "shape=linear"
LINEAR = ("--config.optim.schedule.name=linear",)
DECAYS = (
    "--config.optim.schedule.name=warmup_stable_decay",
    "--config.loop.ema_decay=0.9",
    "--config.checkpoint.every_steps=4",
    "--config.evaluate.every_steps=4",
    "--config.checkpoint.keep_every=4",
)
STABLE = (*DECAYS, "--config.optim.schedule.warmup_stable_decay.decay_fraction=0.0")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def _train(workdir, *arguments, config="configs/pretrain/test.py"):
    chosen = [f"--config={config}"] if config else []
    return main(["train", *chosen, f"--workdir={workdir}", *arguments])


def _error(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    return line


def _rows(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not is_measurement(name)} for row in rows]


def _after(workdir, step):
    return [row for row in _rows(workdir) if row["step"] > step]


def _arrays(workdir, step):
    note = json.loads((workdir / "checkpoints" / str(step) / "metadata" / "metadata").read_text())
    return note["fingerprints"]


def _json(workdir, name):
    return json.loads((workdir / name).read_text())


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "linear"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert _train(workdir, *LINEAR, "--config.loop.steps=6") == 0
    return workdir


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """12 steps at a constant learning rate, with checkpoints of steps 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("runs") / "stable"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert _train(workdir, *STABLE, "--config.loop.steps=12") == 0
    return workdir


def test_a_run_that_goes_on_past_the_end_of_its_schedule_is_refused_with_the_ways(linear, tmp_path, capsys):
    before = (linear / "config.json").read_bytes()
    assert _train(linear, "--config.loop.steps=9", config=None) == 2
    line = _error(capsys)
    assert "config.loop.steps=9 goes past the end of the schedule, config.optim.schedule.steps=6" in line
    for way in ("schedule.steps=9", "schedule.linear.final_fraction above 0", "config.checkpoint.branch_from=DIR@STEP"):
        assert way in line
    assert (linear / "config.json").read_bytes() == before
    assert _train(tmp_path / "new", *LINEAR, "--config.optim.schedule.steps=5", "--config.loop.steps=6", "--check") == 2
    assert "goes past the end" in capsys.readouterr().err
    assert _train(linear, config=None) == 0  # a finished run says so, as before


def test_a_resume_may_change_schedule_and_learning_rate_and_records_it(linear, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(linear, workdir)
    changes = ("--config.optim.schedule.steps=9", "--config.optim.learning_rate=0.02", "--config.loop.steps=9")
    assert _train(workdir, *changes, config=None) == 0
    shown = capsys.readouterr().out
    expected = ["config.loop.steps: 6 -> 9", "config.optim.learning_rate: 0.01 -> 0.02"]
    expected += ["config.optim.schedule.steps: 6 -> 9"]
    assert _json(workdir, "manifest.json")["starts"][-1]["changes"] == expected
    for change in expected:
        assert f"changed at this start: {change}" in shown
    rates = [row["train/learning_rate"] for row in _rows(workdir) if "train/learning_rate" in row]
    # Linear from the end of the warmup at step 4 to step 9, twice as high; before the change as it was.
    assert rates[5:] == pytest.approx([0.0, 0.02 * 2 / 5, 0.02 / 5, 0.0])
    assert _train(workdir, "--config.optim.weight_decay=0.5", config=None) == 2
    assert "optim.learning_rate, optim.schedule, " in capsys.readouterr().err


def test_a_branch_with_an_unchanged_schedule_is_the_undisturbed_run_bit_for_bit(stable, tmp_path, capsys):
    branch = tmp_path / "branch"
    arguments = (*STABLE, "--config.loop.steps=12", f"--config.checkpoint.branch_from={stable}@8")
    assert _train(branch, *arguments) == 0
    assert "begins with checkpoint of step 8 of another run, " in " ".join(capsys.readouterr().out.split())
    assert _after(branch, 0) == _after(stable, 8) and len(_after(branch, 0)) == 5
    assert _arrays(branch, 12) == _arrays(stable, 12)
    assert {"params", "optimizer", "ema", "state"} <= _arrays(branch, 12).keys()
    (start,) = _json(branch, "manifest.json")["starts"]
    assert start["branched_from"] == f"{stable}/checkpoints/8" and start["resumed_from"] == 8
    assert start["changes"] == []


def test_a_run_is_decayed_from_any_checkpoint_at_any_length(stable, tmp_path):
    rates = {}
    for step, steps, fraction in ((8, 10, 0.2), (8, 12, 1 / 3), (4, 6, 1 / 3)):
        branch = tmp_path / f"{step}-{steps}"
        decay = [f"--config.optim.schedule.warmup_stable_decay.{part}" for part in (f"decay_fraction={fraction}", LINE)]
        arguments = (*DECAYS, *decay, f"--config.loop.steps={steps}")
        assert _train(branch, *arguments, f"--config.checkpoint.branch_from={stable}@{step}") == 0
        rates[step, steps] = [row["train/learning_rate"] for row in _rows(branch) if "train/learning_rate" in row]
        changes = _json(branch, "manifest.json")["starts"][0]["changes"]
        assert any(".decay_fraction: 0.0 ->" in change for change in changes)
    assert rates[8, 10] == pytest.approx([0.005, 0.0], abs=1e-9)
    assert rates[8, 12] == pytest.approx([0.0075, 0.005, 0.0025, 0.0], abs=1e-9)
    assert rates[4, 6] == pytest.approx([0.005, 0.0], abs=1e-9)


def test_a_branch_is_resumed_and_does_not_branch_again(stable, tmp_path, capsys):
    """Neither by the same command, nor by the newest step of the other run, which is another one by now."""
    source, branch = tmp_path / "source", tmp_path / "branch"
    shutil.copytree(stable, source)
    shutil.rmtree(source / "checkpoints" / "12")
    command = (*STABLE, f"--config.checkpoint.branch_from={source}")
    assert _train(branch, *command, "--config.loop.steps=10") == 0
    assert _json(branch, "config.json")["checkpoint"]["branch_from"] == f"{source}@8"
    shutil.copytree(stable / "checkpoints" / "12", source / "checkpoints" / "12")
    for arguments, config in ((command, "configs/pretrain/test.py"), ((), None), (STABLE, "configs/pretrain/test.py")):
        # Before its own first checkpoint a branch begins at the same place, and afterwards at its own.
        if arguments == command:
            shutil.rmtree(branch / "checkpoints" / "10")
        steps = 11 if arguments == command else 12
        assert _train(branch, *arguments, f"--config.loop.steps={steps}", config=config) == 0
    starts = _json(branch, "manifest.json")["starts"]
    assert [start["resumed_from"] for start in starts] == [8, 8, 11]
    assert [start["branched_from"] for start in starts] == [f"{source}/checkpoints/8"] * 2 + [None]
    assert [row for row in _after(branch, 0) if "train/loss" in row or row["step"] == 12] == _after(stable, 8)
    capsys.readouterr()
    for other in (f"{stable}@8", f"{source}@4"):
        assert _train(branch, *STABLE, "--config.loop.steps=12", f"--config.checkpoint.branch_from={other}") == 2
        assert f"but the run in this --workdir branched from {source}@8" in capsys.readouterr().err


def _spoil(path):
    for file in (path / "optimizer").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000 and file.parent.name == "d":
            file.write_bytes(bytes(file.stat().st_size))


def test_what_cannot_be_branched_from_is_one_line(stable, tmp_path, capsys):
    damaged, model = tmp_path / "damaged", tmp_path / "model"
    shutil.copytree(stable, damaged)
    _spoil(damaged / "checkpoints" / "8")
    shutil.copytree(stable / "tokenizer", model / "tokenizer")
    (tmp_path / "text.txt").write_text("no model")
    origin = "--config.checkpoint.branch_from="
    cases = {
        (f"{origin}{damaged}@8",): (1, "8 is damaged"),
        (f"{origin}{stable}@7",): (1, "holds no checkpoint of step 7; it has 4, 8, 12"),
        (f"{origin}{tmp_path}/nowhere",): (1, "nowhere is no model directory"),
        (f"{origin}{tmp_path}/text.txt",): (
            1,
            "holds no optimizer state; begin with it by config.checkpoint.init_from",
        ),
        (f"{origin}{stable}@8", f"--config.checkpoint.init_from={stable}"): (2, "exclude each other"),
        (f"{origin}{stable}@8", "--config.loop.steps=8"): (2, "is of step 8; use more than 8"),
        (f"{origin}{stable}@8", "--config.optim.name=muon"): (2, "holds the state of 'adamw'"),
        (f"{origin}{stable}@8", "--config.model.decoder.mlp=96"): (1, "has other shapes"),
    }
    for arguments, (status, part) in cases.items():
        workdir = tmp_path / "run"
        steps = () if "--config.loop.steps=8" in arguments else ("--config.loop.steps=12",)
        assert _train(workdir, *STABLE, *steps, *arguments) == status
        assert part in _error(capsys)
        assert not (workdir / "config.json").exists()
    assert (damaged / "checkpoints" / "8").is_dir(), "a branch changes nothing of the run that it comes from"


def test_a_branch_needs_the_average_that_it_goes_on_with(linear, tmp_path, capsys):
    arguments = (*LINEAR, "--config.loop.steps=9", "--config.loop.ema_decay=0.9")
    assert _train(tmp_path / "run", *arguments, f"--config.checkpoint.branch_from={linear}") == 1
    assert "holds no 'ema', so that training cannot go on from it" in _error(capsys)
