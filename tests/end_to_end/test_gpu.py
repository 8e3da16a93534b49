"""A run on a GPU, from the first step to text: bfloat16, cuDNN attention, a resume. For `make test-gpu`."""

import json
import pathlib

import pytest

from t5x_like.__main__ import main

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.gpu
def test_a_run_trains_resumes_and_continues_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workdir = f"--workdir={tmp_path / 'run'}"
    assert main(["train", "--config=configs/pretrain/test.py", workdir, "--config.loop.steps=20"]) == 0
    assert main(["train", workdir, "--config.loop.steps=30"]) == 0
    assert "bfloat16 compute" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 30 and losses[-1] < 0.85 * losses[0]
    assert main(["generate", str(tmp_path / "run"), "--prompt=To be", "--max_new_tokens=20"]) == 0
    assert capsys.readouterr().out.startswith("To be")
