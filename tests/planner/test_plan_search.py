"""`t5x_like plan --search` from the command line: one real small search that is killed and goes on, and bad input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from t5x_like.__main__ import main
from t5x_like.commands import plan_search
from t5x_like.runs.arguments import load_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOPOLOGY = "--topology=v5e:2x4"
# Activations of 24 layers that no device of 16 GiB holds; with full remat they fit.
CONFIG = """
from t5x_like.configs.pretrain import test


def get_config():
    config = test.get_config()
    config.model.update({"width": 256, "max_length": 512, "remat": "none"})
    config.model.decoder.update({"layers": 24, "heads": 2, "kv_heads": 2, "head_size": 128, "mlp": 1024})
    config.data.update({"batch_size": 1024, "length": 512, "attend_across_documents": True})
    return config
"""
SPACE = ["--search.mesh=fsdp,tensor", "--search.remat=none;full", "--search.micro_batches=1", "--search.rules="]


@pytest.fixture(scope="module")
def place(compiler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    (folder / "wide.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def found(place):
    """The folder of a search whose first process was killed, with its children, as soon as one point was judged.
    (the folder, what the first process left, what the second one said)."""
    folder = place / "found"
    words = ["plan", f"--config={place / 'wide.py'}", TOPOLOGY, "--search", f"--search_dir={folder}", *SPACE]
    words += ["--points=2", "--jobs=1", f"--cache={place / 'cache'}"]
    command = [sys.executable, "-m", "t5x_like", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "s a step" in line:
                break
        first.send_signal(signal.SIGKILL)
    assert not _plans_of(folder)
    left = {path.name: path.stat().st_mtime_ns for path in (folder / "points").glob("*.json")}
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return folder, left, again


def _plans_of(folder):
    """Processes of plans that write into a folder, once those that are being ended are gone."""
    deadline = time.monotonic() + 5
    while found := [pid for pid in os.listdir("/proc") if pid.isdigit() and str(folder).encode() in _words(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def _words(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_config_that_does_not_fit_is_refused_and_the_search_finds_one_that_does(place, found, capsys):
    folder, _, _ = found
    assert main(["plan", f"--config={place / 'wide.py'}", TOPOLOGY, f"--cache={place / 'cache'}"]) == 1
    assert "does not fit" in capsys.readouterr().err
    overrides = _flags(folder)
    assert "--config.model.remat=full" in overrides
    (best,) = [p for p in _index(folder)["points"] if p["name"] == _best(folder)]
    assert best["verdict"]["bytes"] < 15.75 * 2**30


def test_what_a_killed_search_had_judged_is_judged_no_second_time(found):
    folder, left, again = found
    assert len(left) == 1, "killed after the first point"
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "points").glob("*.json")}.items() >= left.items()
    judged = [line for line in again.stderr.splitlines() if "s a step" in line]
    assert not [line for line in judged if "kept from before" not in line and next(iter(left))[:-5] + ":" in line]
    assert len([p for p in _index(folder)["points"] if p["state"] in ("judged", "refused")]) == 2


def test_the_winner_is_taken_by_plan_and_by_train(place, found, tmp_path, capsys):
    folder, _, _ = found
    words = [f"--config={place / 'wide.py'}", *_flags(folder)]
    path = tmp_path / "plan.json"
    assert main(["plan", *words, TOPOLOGY, f"--json={path}", f"--cache={place / 'cache'}"]) == 0
    (best,) = [p for p in _index(folder)["points"] if p["name"] == _best(folder)]
    assert json.loads(path.read_text())["memory"]["total_bytes"] == best["verdict"]["bytes"]
    assert main(["train", *words, f"--workdir={tmp_path / 'run'}", "--check"]) == 0


def test_the_analytic_model_knows_state_and_memory_and_is_a_floor_of_time(found):
    """Of a small program, far below the peak, whose points differ by less than the model knows."""
    folder, _, _ = found
    points = [point for point in _index(folder)["points"] if point["verdict"]]
    for point in points:
        plan = json.loads((folder / "points" / f"{point['name']}.json").read_text())
        parts = point["analytic"]["memory"]
        state = sum(parts[part] for part in ("weights", "optimizer", "batch"))
        assert state == pytest.approx(plan["memory"]["arguments_bytes"], rel=0.05)
        assert point["analytic"]["bytes"] == pytest.approx(plan["memory"]["total_bytes"], rel=0.15)
        assert 0.2 < point["analytic"]["seconds"] / point["verdict"]["seconds"] < 1.0
    assert len(points) == 2


def test_the_table_says_what_is_best_and_why_the_others_were_dropped(found):
    folder, _, again = found
    assert _index(folder)["settings"]["versions"].keys() == {"jax", "libtpu", "t5x_like"}
    assert again.stdout.startswith(f"search of --config={folder.parent / 'wide.py'} on v5e:2x4: ")
    assert f"best: {_best(folder)}" in again.stdout
    whole = (folder / "results.md").read_text()
    for point in _index(folder)["points"]:
        assert point["name"] in whole
    assert "by the analytic model" in whole and "was run" in whole


def test_a_pinned_file_is_the_config_with_the_winner_in_it(place, found, capsys):
    folder, _, _ = found
    words = ["plan", f"--config={place / 'wide.py'}", TOPOLOGY, "--search", f"--search_dir={folder}", *SPACE]
    words += ["--points=2", f"--cache={place / 'cache'}"]
    assert main([*words, "--pin"]) == 0
    pinned = place / "wide_v5litepod_8.py"
    given, _ = load_config([f"--config={place / 'wide.py'}", *_flags(folder)])
    assert load_config([f"--config={pinned}"])[0] == given
    capsys.readouterr()
    assert main([*words, "--pin"]) == 1
    assert "is there already" in capsys.readouterr().err


def _index(folder):
    return json.loads((folder / "search.json").read_text())


def _flags(folder):
    return (folder / plan_search.BEST).read_text().split()


def _best(folder):
    """The name of the point that best.flags stands for."""
    flags = _flags(folder)
    return next(
        p["name"] for p in _index(folder)["points"] if [f"--{k}={v}" for k, v in p["overrides"].items()] == flags
    )


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--search", "--search.mesh=fsdq"], 2, "'fsdq' is no axis of a mesh"),
        (["--search", "--search.remat="], 2, "the space is empty"),
        (["--search", "--search.mesh=fsdp", "--search.config.model.widht=3"], 2, "config.model.widht is unknown"),
        (["--search", "--search.mesh=fsdp", "--config.data.batch_size=7"], 2, "no point can run, such as"),
        (["--search_dir=/tmp/x"], 2, "--search_dir is of a search; give --search too"),
        (["--search.mesh=fsdp"], 2, "--search.mesh=fsdp is of a search; give --search too"),
        (["--search", "--jobs=0"], 2, "--jobs=0 should be at least 1"),
        (["--search", "--json=x.json"], 2, "leave out --json"),
        (["--search", "--search_dir=/proc/no"], 1, "cannot be made"),
        (["--search", "--search_dir=gs://bucket/x"], 1, "is kept on a disk"),
        (["--search", "--config.mesh.tensor=2", "--search.mesh=fsdp"], 2, "searches what --config.mesh.tensor sets"),
    ],
)
def test_bad_input_is_one_line(compiler, capsys, tmp_path, monkeypatch, arguments, status, says):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config=pretrain/test", TOPOLOGY, *arguments]) == status
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("program", [[], ["--program=train"]])
def test_a_config_of_rl_is_not_searched(capsys, tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config=rl/test", TOPOLOGY, "--search", *program]) == 2
    assert capsys.readouterr().err.endswith("this is a config of `t5x_like rl`; leave it out\n")


def test_a_folder_that_belongs_to_another_search_is_refused(place, found, capsys):
    folder, _, _ = found
    words = [
        "plan",
        f"--config={place / 'wide.py'}",
        "--topology=v5e:2x2",
        "--search",
        f"--search_dir={folder}",
        *SPACE,
    ]
    assert main(words) == 1
    assert 'holds another search (topology was "v5e:2x4" and is "v5e:2x2")' in capsys.readouterr().err
