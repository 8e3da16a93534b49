"""What earlier formats stored is read by the code of today: runs load, generate and resume."""

import hashlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.core import formats
from t5x_like.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPECIMEN = ROOT / "tests" / "specimens" / "format1"
EXPECTED = json.loads((SPECIMEN / "expected.json").read_text())


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def workdir(tmp_path):
    return pathlib.Path(shutil.copytree(SPECIMEN / "run", tmp_path / "run"))


def same_machine():
    """Whether the bits can be those of the specimen: the versions and the CPU's features are."""
    numerical = ("jax", "jaxlib", "flax", "optax", "numpy")
    if any(metadata.version(name) != EXPECTED["versions"][name] for name in numerical):
        return False
    if platform.machine() != EXPECTED["machine"] or not os.path.exists("/proc/cpuinfo"):
        return False
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest() == EXPECTED["cpu_flags_sha256"]


def rows_of(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in kept if name in row} for row, kept in zip(rows, EXPECTED["rows"], strict=True)]


def test_a_model_of_format_1_generates_and_scores_as_it_did():
    lm = t5x_like.load(SPECIMEN / "run")
    assert lm.generate(EXPECTED["prompt"], max_new_tokens=24, temperature=0) == [EXPECTED["text"]]
    averaged = t5x_like.load(SPECIMEN / "run", ema=True)
    assert averaged.generate(EXPECTED["prompt"], max_new_tokens=24, temperature=0) == [EXPECTED["ema_text"]]
    ((found, _),) = lm.log_likelihood(["First Citizen:"], [" Before we proceed"])
    assert found == pytest.approx(EXPECTED["log_likelihood"], rel=1e-5)


def alone(*arguments):
    """A command in a process of its own: on one device, as the specimen was made."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "t5x_like", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_run_of_format_1_is_resumed_to_the_same_bits(workdir):
    done = alone("train", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    found = rows_of(workdir)
    if same_machine():
        assert found == EXPECTED["rows"]
    for row, expected in zip(found, EXPECTED["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-6)
    assert json.loads((workdir / "config.json").read_text())["format"] > 1
    starts = json.loads((workdir / "manifest.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, 6]
    again = alone("train", f"--workdir={workdir}")  # what it wrote is read again
    assert (again.returncode, again.stdout.splitlines()[-1].endswith("is finished: 12 of 12 steps are done")) == (
        0,
        True,
    )


def test_a_config_file_goes_on_with_a_run_of_format_1(workdir):
    stored = formats.upgrade(json.loads((workdir / "config.json").read_text()), where="")
    model = stored["model"]
    arguments = [f"--config.model.{name}={model[name]}" for name in ("width", "vocab_multiple")]
    names = ("heads", "kv_heads", "head_size", "mlp")
    arguments += [f"--config.model.decoder.{name}={model['decoder'][name]}" for name in names]
    for section, fields in (("data", ("source", "validation", "batch_size")), ("loop", ("ema_decay",))):
        arguments += [f"--config.{section}.{name}={stored[section][name]}" for name in fields]
    command = ["train", "--config=configs/pretrain/test.py", f"--workdir={workdir}", "--check", *arguments]
    done = alone(*command, "--config.loop.steps=14")  # the schedule keeps the length of the first start
    assert done.returncode == 0, done.stderr
    assert "config.loop.steps: 12 -> 14" in done.stdout and "config.loop.on_spike: 'skip' -> 'off'" in done.stdout
    done = alone(*command, "--config.optim.name=lion")
    assert done.returncode == 2 and "config.optim.name: 'adamw' -> 'lion'" in done.stderr


def test_a_new_run_begins_with_parameters_of_format_1(tmp_path, capsys):
    arguments = ["width=16", "decoder.heads=2", "decoder.kv_heads=1", "decoder.mlp=32", "vocab_multiple=8"]
    command = ["train", "--config=configs/pretrain/test.py", f"--workdir={tmp_path / 'new'}"]
    command += [f"--config.model.{argument}" for argument in arguments]
    command += [f"--config.checkpoint.init_from={SPECIMEN / 'run'}", "--config.loop.steps=1"]
    command += ["--config.optim.schedule.warmup_steps=0", f"--config.data.source=text:{SPECIMEN / 'text.txt'}"]
    assert main(command) == 0
    assert "11 of 11 parameters" in capsys.readouterr().out
    row = json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["train/loss"] < 5.0  # random parameters give 5.55


def test_inspect_describes_a_checkpoint_and_a_step_of_format_1(workdir, capsys):
    assert main(["inspect", str(workdir)]) == 0
    assert "(step 6, saved " in capsys.readouterr().out


def test_a_run_of_a_newer_format_is_one_line(workdir, capsys):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps({**config, "format": 99}))
    assert main(["train", f"--workdir={workdir}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json is of format 99, and this program knows up to" in line


@pytest.mark.parametrize("number", [3, 7])
def test_a_run_of_a_format_generates_as_it_did_and_is_resumed_to_the_same_losses(number, tmp_path):
    specimen = ROOT / "tests" / "specimens" / f"format{number}"
    expected = json.loads((specimen / "expected.json").read_text())
    workdir = pathlib.Path(shutil.copytree(specimen / "run", tmp_path / "run"))
    assert t5x_like.load(workdir).generate(expected["prompt"], max_new_tokens=24, temperature=0) == [expected["text"]]
    done = alone("train", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(expected["rows"])
    for row, then in zip(rows, expected["rows"], strict=True):
        assert {name: row[name] for name in then} == pytest.approx(then, rel=1e-6)
    assert json.loads((workdir / "config.json").read_text())["format"] > number


def test_reinforcement_learning_of_format_5_goes_on_with_the_answers_that_it_holds(tmp_path):
    """Steps 7 and 8 are updates of stored answers, 9 and 10 draw new ones."""
    specimen = ROOT / "tests" / "specimens" / "format5"
    expected = json.loads((specimen / "expected.json").read_text())["rows"]
    workdir = pathlib.Path(shutil.copytree(specimen / "run", tmp_path / "run"))
    done = alone("rl", "--config=configs/rl/test.py", f"--workdir={workdir}", *GIVEN)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [{name: row[name] for name in expected[0]} for row in rows if "train/loss" in row]
    assert found == [pytest.approx(then, rel=1e-5, abs=1e-7) for then in expected]
    config = json.loads((workdir / "config.json").read_text())
    assert config["format"] > 5 and config["rl"]["answers_per_row"] == 1


# A config file comes along, since a stored config holds no functions: what the run had besides.
GIVEN = [
    *("--config.seed=1", "--config.runtime.threads=1", "--config.rl.epochs=2", "--config.loop.steps=10"),
    *("--config.checkpoint.every_steps=6", "--config.evaluate.every_steps=10", "--config.model.width=16"),
    *("--config.model.decoder.layers=1", "--config.model.decoder.mlp=32"),
]

ADAPTER = ROOT / "tests" / "specimens" / "adapter"
ADAPTER_EXPECTED = ADAPTER / "expected.json"


def scored(lm):
    ((found, _),) = lm.log_likelihood(["First Citizen:"], [" Before we proceed"])
    return found


@pytest.mark.parametrize("name", ["old", "new"])
def test_an_adapter_is_read_with_its_base(name, tmp_path):
    """Its base lay elsewhere when it was trained. One of before the way to it was stored must be told where it is."""
    expected = json.loads(ADAPTER_EXPECTED.read_text())
    folder = pathlib.Path(shutil.copytree(ADAPTER, tmp_path / "moved"))
    if name == "old":
        with pytest.raises(UserError, match="which is not there; move it back, or say where it lies"):
            t5x_like.load(folder / "old")
        lm = t5x_like.load(folder / "old", base=folder / "base")
    else:
        lm = t5x_like.load(folder / "new")
    assert lm.generate(expected["prompt"], max_new_tokens=24, temperature=0) == [expected["text"]]
    assert scored(lm) == pytest.approx(expected["log_likelihood"], rel=1e-5)
    assert scored(t5x_like.load(folder / "base")) == pytest.approx(expected["log_likelihood_of_base"], rel=1e-5)
    assert abs(expected["log_likelihood"] / expected["log_likelihood_of_base"] - 1) > 1e-4


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_run_of_an_adapter_is_resumed_to_the_same_losses(name, tmp_path):
    expected = json.loads(ADAPTER_EXPECTED.read_text())["rows"]
    workdir = pathlib.Path(shutil.copytree(ADAPTER, tmp_path / "moved")) / name
    base = [f"--config.checkpoint.init_from={workdir.parent / 'base'}"] if name == "old" else []
    done = alone("train", f"--workdir={workdir}", *base)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [{name: row[name] for name in expected[0]} for row in rows if "train/loss" in row]
    assert len(found) == 6
    for row, then in zip(found, expected, strict=True):
        assert row == pytest.approx(then, rel=1e-6)
