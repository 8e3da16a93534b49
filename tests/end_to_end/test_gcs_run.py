"""A whole run whose workdir and token cache lie in a bucket: train, kill, resume, generate. The server is real."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from t5x_like.__main__ import main
from t5x_like.storage import model_directory, paths
from tests.storage.fake_gcs import fake_gcs  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/pretrain/test.py"
STEPS = "--config.loop.steps=60"


def _losses(rows: str) -> dict[int, float]:
    parsed = [json.loads(line) for line in rows.splitlines()]
    return {row["step"]: row["train/loss"] for row in parsed if "train/loss" in row}


def test_a_run_in_a_bucket_survives_a_kill_and_its_model_is_read_from_there(fake_gcs, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(ROOT)
    bucket = fake_gcs.bucket()
    workdir = f"{bucket}/runs/one"
    arguments = ["train", CONFIG, STEPS, f"--workdir={workdir}", "--config.runtime.fake_devices=8"]
    with open(tmp_path / "output.txt", "w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "t5x_like", *arguments],
            cwd=ROOT,
            env=os.environ | fake_gcs.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 240
            while not model_directory.committed_steps(f"{workdir}/checkpoints"):
                assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
                time.sleep(0.05)
            child.send_signal(signal.SIGKILL)
        finally:
            child.kill()
            child.wait()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"

    assert main(["train", f"--workdir={workdir}"]) == 0
    starts = paths.read_json(f"{workdir}/manifest.json")["starts"]
    assert len(starts) == 2 and starts[1]["resumed_from"] >= 10
    assert paths.exists(f"{bucket}/runs/one/cache")

    local = tmp_path / "undisturbed"
    assert main([*arguments[:3], f"--workdir={local}", *arguments[4:]]) == 0
    undisturbed = _losses((local / "metrics.jsonl").read_text())
    assert len(undisturbed) == 60
    assert _losses(paths.read_text(f"{workdir}/metrics.jsonl")) == undisturbed

    capsys.readouterr()
    assert main(["generate", workdir, "--prompt=To be", "--max_new_tokens=8", "--temperature=0"]) == 0
    remote = capsys.readouterr().out
    assert main(["generate", str(local), "--prompt=To be", "--max_new_tokens=8", "--temperature=0"]) == 0
    assert remote == capsys.readouterr().out and remote.startswith("To be")
