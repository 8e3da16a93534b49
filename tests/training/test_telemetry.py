"""Claims about what a run tells: rows, rates, lost time, the start-up screen, logs, the picture, the profile."""

import io
import json
import logging
import os

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from t5x_like.core.errors import UserError
from t5x_like.core.metrics import is_measurement, read_rows
from t5x_like.storage import paths
from t5x_like.training import curves
from t5x_like.training.telemetry import ProfileConfig, Telemetry, TelemetryConfig
from t5x_like.training.trackers import MlflowConfig, WandbConfig
from tests.storage.fake_gcs import fake_gcs  # noqa: F401


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def config(**changes):
    fields = {
        "tensorboard": False,
        "plot": False,
        "plot_every_seconds": 60.0,
        "measure_cpu_peak": False,
        "profile": ProfileConfig(start_step=0, steps=0),
        "wandb": WandbConfig("", "offline"),
        "mlflow": MlflowConfig("", ""),
    }
    return TelemetryConfig(**(fields | changes))


def make(directory, clock=None, *, start_step=0, run_config=None, **changes):
    stream = io.StringIO()
    telemetry = Telemetry(
        config(**changes),
        str(directory),
        flops_per_token=1e6,
        tokens_per_step=1000,
        devices=jax.devices()[:1],
        compiler_options=None,
        total_steps=10,
        start_step=start_step,
        run_config=run_config,
        stream=stream,
        clock=clock or Clock(),
    )
    return telemetry, stream


def rows(directory):
    return list(read_rows(str(directory / "metrics.jsonl")))


VALUES = {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3}


def test_rates_count_steps_alone_and_shares_count_what_was_lost(tmp_path):
    clock = Clock()
    telemetry, stream = make(tmp_path, clock)
    with telemetry.timed("compile"):
        clock.now += 8
    for step in (1, 2):
        telemetry.before_step(step)
        with telemetry.timed("input"):
            clock.now += 1
        clock.now += 1
        telemetry.log_step(step, VALUES, write=step == 2)
    with telemetry.timed("checkpoint"):
        clock.now += 3
        with telemetry.timed("evaluate"):
            clock.now += 5
    clock.now += 2
    telemetry.log_step(3, VALUES, write=True)
    telemetry.close()
    first, second = rows(tmp_path)
    assert first["step"] == 2 and first["train/tokens_per_second"] == 2 * 1000 / 4
    assert first["train/model_flops_per_second"] == 500 * 1e6 and "train/mfu" not in first
    assert second["step"] == 3 and second["train/step_seconds"] == 2
    shares = {name: second[f"time/{name}_share"] * 22 for name in ("input", "compile", "checkpoint", "evaluate")}
    assert shares == pytest.approx({"input": 2, "compile": 8, "checkpoint": 3, "evaluate": 5})
    # 3 steps in 14 s since the first one began, 7 steps to go.
    assert "step 3/10  loss 2.5000  grad 1  lr 1.00e-03" in stream.getvalue() and "ETA 0:33" in stream.getvalue()


def test_the_value_of_a_row_is_of_that_step_and_not_a_mean(tmp_path):
    telemetry, _ = make(tmp_path)
    for step in range(1, 5):
        telemetry.log_step(step, VALUES | {"loss": float(step)}, write=step % 2 == 0)
    telemetry.close()
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [(2, 2.0), (4, 4.0)]


def test_a_resumed_run_leaves_the_rows_of_an_undisturbed_one(tmp_path):
    def run(directory, first, last):
        telemetry, _ = make(directory, start_step=first, tensorboard=True)
        for step in range(first + 1, last + 1):
            telemetry.log_step(step, VALUES | {"loss": np.float32(1) / np.float32(step)}, write=True)
            if step % 2 == 0:
                telemetry.log_evaluation(step, "validation", {"loss": 1.0 / step})
        telemetry.close()

    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "parts", 0, 5)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ti')
    assert rows(tmp_path / "parts") != rows(tmp_path / "whole")
    run(tmp_path / "parts", 4, 6)
    kept = [
        [{name: value for name, value in row.items() if not is_measurement(name)} for row in rows(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 9
    assert len(os.listdir(tmp_path / "parts" / "tensorboard")) == 2


def test_the_summary_shows_each_section_once_and_states_the_convention(tmp_path):
    telemetry, stream = make(tmp_path)
    telemetry.summary({"model": {"family": "llama", "parameters": "30.4M"}, "data": {"fingerprint": "abc"}})
    telemetry.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].split() == ["model", "family", "llama"] and lines[1].split() == ["parameters", "30.4M"]
    assert "model FLOPs" in lines[3] and "no recomputation" in " ".join(lines[4:])
    assert all(len(line) <= 120 for line in lines)
    assert "family" in (tmp_path / "log.txt").read_text()


def test_warnings_of_any_component_reach_terminal_and_log_once_and_stop_with_the_run(tmp_path, caplog):
    telemetry, stream = make(tmp_path)
    logging.getLogger("t5x_like.storage.checkpoint").warning("the disk is nearly full")
    telemetry.close()
    logging.getLogger("t5x_like.storage.checkpoint").warning("said after the run")
    for text in (stream.getvalue(), (tmp_path / "log.txt").read_text()):
        assert text.count("nearly full") == 1 and "after the run" not in text
    assert "nearly full" not in caplog.text and "after the run" in caplog.text


def test_another_process_writes_its_own_log_and_no_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    telemetry, stream = make(tmp_path, tensorboard=True, plot=True)
    telemetry.summary({"model": {"family": "llama"}})
    telemetry.log_step(1, VALUES, write=True)
    telemetry.log_evaluation(1, "validation", {"loss": 1.0})
    telemetry.flush(1, last=False)
    telemetry.close()
    assert os.listdir(tmp_path) == ["log.3.txt"] and stream.getvalue() == ""


def test_loss_png_is_a_picture_of_the_rows(tmp_path):
    telemetry, _ = make(tmp_path, plot=True)
    for step in range(1, 9):
        telemetry.log_step(step, VALUES | {"loss": float("nan") if step == 5 else 3.0 / step}, write=True)
    telemetry.log_evaluation(8, "validation", {"loss": 1.0, "bits_per_byte": 2.0})
    telemetry.close()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and telemetry.plot_path.endswith("loss.png")
    assert curves.read_curves(str(tmp_path / "metrics.jsonl"))["eval/validation/bits_per_byte"] == ([8], [2.0])


def test_a_run_that_made_no_step_leaves_no_picture(tmp_path):
    telemetry, _ = make(tmp_path, plot=True)
    telemetry.close()
    assert not (tmp_path / "loss.png").exists()


def test_the_profiler_window_opens_and_closes_at_its_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", step, folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    telemetry, _ = make(tmp_path, profile=ProfileConfig(start_step=2, steps=3))
    for step in range(1, 11):
        telemetry.before_step(step)
    telemetry.close()
    # Steps 2, 3 and 4 are inside; step 4 is over for certain when step 6 was dispatched.
    assert calls == [("start", 2, str(tmp_path / "profile")), ("stop", 7)]


def test_a_memory_report_of_the_device_becomes_part_of_the_row(tmp_path):
    class Device:
        device_kind, platform, process_index = "TPU v5 lite", "tpu", 0

        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used, "bytes_limit": 16 * 2**30}

    clock, stream = Clock(), io.StringIO()
    telemetry = Telemetry(
        config(),
        str(tmp_path),
        flops_per_token=197e9,
        tokens_per_step=1000,
        devices=[Device(5), Device(7)],
        compiler_options=None,
        total_steps=10,
        start_step=0,
        stream=stream,
        clock=clock,
    )
    telemetry.summary({})
    clock.now += 1
    telemetry.log_step(1, VALUES, write=True)
    telemetry.close()
    (row,) = rows(tmp_path)
    assert row["memory/in_use_bytes"] == 7 and row["memory/peak_bytes"] == 14 and row["train/mfu"] == 0.5
    assert "16.0 GiB a device" in stream.getvalue() and "2 x TPU v5 lite" in stream.getvalue()


@pytest.mark.parametrize("devices", [1, 8])
def test_the_cpu_peak_is_plausible_whatever_the_mesh_in_context(devices, tmp_path):
    with jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))):
        telemetry, stream = make(tmp_path, measure_cpu_peak=True)
    telemetry.summary({})
    telemetry.close()
    assert telemetry._peak is not None and 1e8 < telemetry._peak < 1e14 and "measured here" in stream.getvalue()


def test_rows_are_json_that_any_tool_reads(tmp_path):
    telemetry, _ = make(tmp_path)
    telemetry.log_step(1, VALUES | {"loss": float("inf")}, write=True)
    telemetry.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == "Infinity"


def test_a_workdir_in_a_bucket_gets_all_files_and_a_resume_goes_on_with_them(fake_gcs, tmp_path):  # noqa: F811
    root = f"{fake_gcs.bucket()}/run"
    for first, last in ((0, 4), (2, 6)):
        telemetry, _ = make(root, start_step=first, tensorboard=True, plot=True)
        local = os.path.dirname(telemetry.log_path)
        for step in range(first + 1, last + 1):
            telemetry.log_step(step, VALUES | {"loss": 1.0 / step}, write=True)
        assert not first or paths.read_text(f"{root}/metrics.jsonl").count("\n") == 4
        telemetry.flush(last, last=False)
        assert paths.read_text(f"{root}/metrics.jsonl").count("\n") == last
        telemetry.close()
        assert not os.path.exists(local) and telemetry.plot_path == f"{root}/loss.png"
    assert set(paths.list_names(root)) == {"log.txt", "loss.png", "metrics.jsonl", "tensorboard"}
    assert len(paths.list_names(f"{root}/tensorboard")) == 2
    paths.copy_file(f"{root}/metrics.jsonl", str(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert paths.read_text(f"{root}/log.txt").count("step 1/10") == 1


def test_a_bucket_that_is_away_for_a_while_does_not_end_the_run(fake_gcs, monkeypatch):  # noqa: F811
    root = f"{fake_gcs.bucket()}/run"
    telemetry, stream = make(root)
    telemetry.log_step(1, VALUES, write=True)

    def away(source, target):
        raise UserError(f"{target}: the bucket cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(paths, "copy_file", away)
        telemetry.flush(1, last=False)
        with pytest.raises(UserError, match="cannot be reached; the last metrics are not written"):
            telemetry.flush(1, last=True)
    assert "cannot be reached" in stream.getvalue() and not paths.exists(f"{root}/metrics.jsonl")
    telemetry.close()
    assert paths.exists(f"{root}/metrics.jsonl")
