"""A workdir belongs to one config and one writer; whatever else stands in it is refused, and nothing is lost."""

import copy
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.parallel.multihost import ALONE
from t5x_like.runs.train import MAY_CHANGE
from t5x_like.storage import lock, manifest
from t5x_like.storage.workdir import Workdir, differences, read_config, recorded_threads

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = {
    "seed": 0,
    "model": {"layers": 2, "windows": [None, 8]},
    "data": {"source": "text:a"},
    "optim": {"learning_rate": 1e-3, "weight_decay": 0.1},
    "objective": {"name": "lm"},
    "loop": {"steps": 100, "micro_batches": 1},
    "mesh": {"preset": "fsdp"},
    "checkpoint": {"every_steps": 10},
    "evaluate": {"every_steps": 10},
    "telemetry": {"plot": True},
    "runtime": {"threads": 0},
}


def _entry(threads=2):
    return manifest.start_entry(
        data="d41d",
        tokenizer="8cd9",
        mesh={"data": 1, "fsdp": 8},
        platform="cpu",
        devices=8,
        processes=1,
        threads=threads,
        resumed_from=None,
    )


def _start(root, config=CONFIG, threads=2):
    with Workdir.open(str(root), processes=ALONE) as workdir:
        workdir.check_config(config, may_change=MAY_CHANGE)
        os.makedirs(workdir.tokenizer, exist_ok=True)
        pathlib.Path(workdir.tokenizer, "tokenizer.json").write_text("{}")
        workdir.record_start(config=config, overrides={"loop.steps": 100}, entry=_entry(threads))
    return root


def _changed(**changes):
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    return config


def test_a_start_is_recorded_and_read_back(tmp_path):
    root = tmp_path / "run"
    assert read_config(str(root)) is None and recorded_threads(str(root)) is None
    _start(root, threads=2)
    _start(root, threads=3)
    assert read_config(str(root)) == CONFIG and recorded_threads(str(root)) == 2
    assert json.loads((root / "overrides.json").read_text()) == {"loop.steps": 100}
    starts = json.loads((root / "manifest.json").read_text())["starts"]
    assert [entry["threads"] for entry in starts] == [2, 3]
    assert starts[0]["mesh"] == {"data": 1, "fsdp": 8} and starts[0]["versions"]["jax"]
    assert starts[0]["tokenizer_sha256"].keys() == {"tokenizer.json"}


@pytest.mark.parametrize(
    "changes",
    [
        {"loop__steps": 200},
        {"loop__on_spike": "skip"},
        {"data__source": "text:b"},
        {"mesh__preset": "data"},
        {"runtime__threads": 1},
        {"telemetry__plot": False},
        {"checkpoint__every_steps": 5},
        {"evaluate__every_steps": 5},
    ],
)
def test_a_resume_may_change_where_and_how_long_it_runs(tmp_path, changes):
    root = _start(tmp_path / "run")
    with Workdir.open(str(root), processes=ALONE) as workdir:
        found = workdir.check_config(_changed(**changes), may_change=MAY_CHANGE)
    ((path, value),) = changes.items()
    assert [(change.path, change.after) for change in found] == [(f"config.{path.replace('__', '.')}", value)]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"seed": 1}, "config.seed: 0 -> 1"),
        ({"model__layers": 4}, "config.model.layers: 2 -> 4"),
        ({"model__windows": [8, 8]}, r"config.model.windows: \[None, 8\] -> \[8, 8\]"),
        ({"optim__weight_decay": 0.2, "mesh__preset": "data"}, "config.optim.weight_decay: 0.1 -> 0.2"),
        ({"objective__name": "dpo"}, "config.objective.name: 'lm' -> 'dpo'"),
        ({"loop__micro_batches": 2}, "config.loop.micro_batches: 1 -> 2"),
        ({"model__extra": 1}, "config.model.extra: absent -> 1"),
    ],
)
def test_a_resume_may_not_change_what_the_run_is(tmp_path, changes, shown):
    root = _start(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    with Workdir.open(str(root), processes=ALONE) as workdir, pytest.raises(UsageError, match=shown) as caught:
        workdir.check_config(_changed(**changes), may_change=MAY_CHANGE)
    assert "--config.checkpoint.init_from=" in str(caught.value) and "\n" not in str(caught.value)
    assert "mesh.preset" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()} == before


def test_tuples_of_a_config_equal_the_lists_they_are_stored_as(tmp_path):
    root = _start(tmp_path / "run")
    with Workdir.open(str(root), processes=ALONE) as workdir:
        assert workdir.check_config(_changed(model__windows=(None, 8)), may_change=MAY_CHANGE) == []


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UserError, match="is no workdir: it holds thesis.tex"),
        Workdir.open(str(tmp_path), processes=ALONE),
    ):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_an_interrupted_first_start_left_is_no_obstacle(tmp_path):
    for name in ("log.txt", "lock", "manifest.json", ".hidden"):
        (tmp_path / name).write_text('{"starts": []}' if name == "manifest.json" else "")
    (tmp_path / "tokenizer").mkdir()
    _start(tmp_path)


def test_checkpoints_without_their_config_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with (
        pytest.raises(UserError, match="holds checkpoints but no config.json"),
        Workdir.open(str(tmp_path), processes=ALONE),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"seed": 0', "config.json is damaged: no JSON"),
        ("config.json", "[]", "config.json is damaged: no mapping"),
        ("config.json", '{"seed": 1}', "config.json is not what the run was started with"),
        ("manifest.json", "{}", "manifest.json is damaged: it has no list of starts"),
        ("manifest.json", '{"starts": [', "manifest.json is damaged: no JSON"),
        ("manifest.json", None, "no start in manifest.json"),
        ("tokenizer/tokenizer.json", "{ }", "tokenizer.json has changed since the run was started"),
        ("tokenizer/tokenizer.json", None, "tokenizer.json is missing since the run was started"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content, message):
    root = _start(tmp_path / "run")
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    for write in (True, False):
        with pytest.raises(UserError, match=message) as caught, Workdir.open(str(root), processes=ALONE, write=write):
            pass
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stop_before", ["overrides.json", "config.json"])
def test_a_kill_while_a_start_is_recorded_leaves_a_workdir_that_opens(tmp_path, monkeypatch, stop_before):
    root = _start(tmp_path / "run")
    from t5x_like.storage import paths

    write = paths.write_bytes_atomic

    def stop(path, data):
        if path.endswith(stop_before):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(paths, "write_bytes_atomic", stop)
    with pytest.raises(KeyboardInterrupt):
        _start(root, _changed(loop__steps=200))
    monkeypatch.undo()
    with Workdir.open(str(root), processes=ALONE) as workdir:
        assert workdir.config() == CONFIG


def test_finished_is_said_until_the_next_start(tmp_path):
    root = _start(tmp_path / "run")
    with Workdir.open(str(root), processes=ALONE) as workdir:
        assert workdir.finished_step() is None
        workdir.record_finished(100)
        assert workdir.finished_step() == 100
    _start(root, _changed(loop__steps=200))
    with Workdir.open(str(root), processes=ALONE, write=False) as workdir:
        assert workdir.finished_step() is None


def test_looking_writes_nothing_and_needs_no_lock(tmp_path):
    root = tmp_path / "run"
    with Workdir.open(str(root), processes=ALONE, write=False) as workdir:
        assert workdir.config() is None
    assert not root.exists()
    _start(root)
    with lock.locked(str(root)), Workdir.open(str(root), processes=ALONE, write=False) as workdir:
        assert workdir.config() == CONFIG


HOLDER = """
import sys, time
from t5x_like.storage import lock
with lock.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_the_lock_of_a_killed_one_is_free(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=f"is in use by process {holder.pid} on .*; wait for it"),
            lock.locked(str(tmp_path)),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock.locked(str(tmp_path)):
        pass


def test_without_locks_in_the_file_system_the_living_process_is_asked(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        monkeypatch.setattr("fcntl.flock", no_locks)
        with pytest.raises(UserError, match="is in use by process"), lock.locked(str(tmp_path)):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock.locked(str(tmp_path)):
        pass


def test_differences_are_found_at_any_depth():
    changes = differences({"a": {"b": {"c": 1}}, "e": {}}, {"a": {"b": {"c": 2, "d": {}}}, "e": {}})
    assert [str(change) for change in changes] == ["config.a.b.c: 1 -> 2", "config.a.b.d: absent -> {}"]


def test_the_revision_is_that_of_this_code():
    found = manifest.revision()
    assert found is None or (len(found["commit"]) == 40 and isinstance(found["changed"], bool))
