"""Weights & Biases (offline) and MLflow (a local folder), by the real packages: resumed, whole, never in the way."""

import json
import logging
import pathlib
import threading
import time
import types

import pytest

from t5x_like.core.errors import UsageError
from t5x_like.training import trackers
from t5x_like.training.trackers import Background, MlflowConfig, WandbConfig
from tests.training.test_telemetry import make

CONFIG = {"seed": 3, "optim": {"name": "adamw", "learning_rate": 0.5}, "data": {"fields": {"text": "t" * 600}}}


@pytest.fixture
def warnings():
    """The warnings so far, as the log of a run gets them."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("t5x_like").addHandler(handler)
    yield lambda: found
    logging.getLogger("t5x_like").removeHandler(handler)


def run(workdir, start, end, *, config=CONFIG, **chosen):
    """The telemetry of one start that comes from step `start` to `end`."""
    telemetry, _ = make(workdir, start_step=start, plot=True, run_config=config, **chosen)
    with telemetry:
        telemetry.summary({"model": {"parameters": "26.9k"}})
        for step in range(start + 1, end + 1):
            telemetry.log_step(step, {"loss": 10.0 / step}, write=True)
        telemetry.log_evaluation(end, "validation", {"loss": 2.0 + end})
        telemetry.flush(end, last=True)


def test_mlflow_holds_config_metrics_start_screen_and_curves_of_all_starts_in_one_run(tmp_path, monkeypatch, warnings):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    chosen = {"mlflow": MlflowConfig(str(tmp_path / "store"), "tests")}
    run(tmp_path / "run", 0, 4, **chosen)
    changed = CONFIG | {"optim": {"name": "adamw", "learning_rate": 0.25}}
    run(tmp_path / "run", 2, 6, config=changed, **chosen)  # killed after step 4, restored at step 2
    assert warnings() == []
    client = MlflowClient(tracking_uri=f"file:{tmp_path}/store")
    (found,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"mlflow": found.info.run_id}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 10.0 / step) for step in range(1, 7)]
    evaluations = client.get_metric_history(found.info.run_id, "eval/validation/loss")
    assert [(metric.step, metric.value) for metric in evaluations] == [(4, 6.0), (6, 8.0)]
    assert found.data.params["optim.learning_rate"] == "0.5" and len(found.data.params["data.fields.text"]) == 500
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"config.json", "start.txt", "loss.png"}
    stored = client.download_artifacts(found.info.run_id, "config.json", str(tmp_path))
    assert json.loads(pathlib.Path(stored).read_text())["optim"]["learning_rate"] == 0.25


def scan(path):
    """The records of an offline file of Weights & Biases: LevelDB's log format, behind a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def records(path):
    """What an offline file of Weights & Biases holds: (id of the run, config, [history rows], summary)."""
    from wandb.proto import wandb_internal_pb2

    config, rows, summary, run_id = {}, [], {}, ""
    for data in scan(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        updates = [*record.run.config.update, *record.config.update]
        config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
        run_id = record.run.run_id or run_id
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append(items)
    return run_id, config, rows, summary


def test_weights_and_biases_hold_config_metrics_start_screen_and_curves_in_one_run(tmp_path, warnings):
    pytest.importorskip("wandb")
    chosen = {"wandb": WandbConfig("tests", "offline")}
    run(tmp_path / "run", 0, 3, **chosen)
    run(tmp_path / "run", 2, 4, **chosen)
    assert warnings() == []
    identity = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    found = [records(path) for path in sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))]
    assert len(found) == 2 and [each[0] for each in found] == [identity] * 2
    for (_, config, rows, summary), steps in zip(found, ((1, 2, 3), (3, 4)), strict=True):
        assert config["seed"] == 3 and config["optim"]["learning_rate"] == 0.5
        losses = {row["_step"]: row["train/loss"] for row in rows if "train/loss" in row}
        assert losses == {step: 10.0 / step for step in steps}
        assert any("eval/validation/loss" in row for row in rows)
        assert summary["start/model/parameters"] == "26.9k"
        assert any(row.get("curves/_type") == "image-file" for row in rows)
    images = list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert len(images) == 2


class Broken:
    """A service that fails at the call that is named, the beginning included."""

    def __init__(self, at, error):
        self.at, self.error, self.seen = at, error, []
        self._call("begin")

    def _call(self, name):
        self.seen.append(name)
        if name == self.at:
            raise self.error

    def log(self, step, values):
        self._call("log")

    def describe(self, facts):
        self._call("describe")

    def picture(self, path):
        self._call("picture")

    def close(self):
        self._call("close")


@pytest.mark.parametrize("error", [RuntimeError("no\n network"), SystemExit(1), OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", ["begin", "describe", "log", "picture", "close"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(tmp_path, monkeypatch, warnings, at, error):
    monkeypatch.setattr(trackers, "_Wandb", lambda config, place: Broken(at, error))
    run(tmp_path, 0, 4, wandb=WandbConfig("tests", "online"))
    (line,) = warnings()
    assert line.startswith("Weights & Biases stops here: ") and "\n" not in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_library_that_is_not_installed_is_one_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    run(tmp_path, 0, 2, wandb=WandbConfig("tests", "offline"))
    (line,) = warnings()
    assert "ModuleNotFoundError" in line and "pip install t5x_like[trackers]" in line


def test_a_service_that_hangs_holds_no_step_and_the_end_for_a_while_only(monkeypatch, warnings):
    monkeypatch.setattr(trackers, "_LEAVING", 0.2)
    monkeypatch.setattr(trackers, "_WAITING", 5)
    ever = threading.Event()
    tracker = Background("MLflow", lambda: types.SimpleNamespace(log=lambda *_: ever.wait()))
    begun = time.monotonic()
    for step in range(100):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert time.monotonic() - begun < 5 and len(warnings()) == 1
    ever.set()


def test_a_mode_that_is_none_is_named():
    with pytest.raises(UsageError, match="config.telemetry.wandb.mode='on' should be 'offline' or 'online'"):
        WandbConfig("p", "on").check("config.telemetry.wandb")
