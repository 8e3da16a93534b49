"""Runs on a GPU, from the first step to text: bfloat16, attention over packed rows and with position biases, a resume.

For `make test-gpu` and tools/gpu_report.py. That cuDNN's kernel is the definition is tested in
tests/layers/attention/test_kernels.py.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from t5x_like.__main__ import main
from t5x_like.layers.attention.choice import attention_path
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.platform import compute_capability, platform

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize(("packed", "bias"), [(False, False), (True, False), (False, True)])
def test_attention_takes_the_kernel_of_cudnn(packed, bias):
    q, k = (jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (8, 2))
    segments = jnp.ones((2, 128), jnp.int32) if packed else None
    mask = MaskSpec(causal=True, q_segments_BT=segments, k_segments_BS=segments)
    path = attention_path(
        q, k, mask, softcap=False, bias=bias, platform=platform(), compute_capability=compute_capability()
    )
    assert path[0] == "cudnn", path


def losses(workdir: pathlib.Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.gpu
def test_a_run_on_packed_rows_trains_resumes_and_continues_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    workdir = f"--workdir={tmp_path / 'run'}"
    packed = "--config.data.attend_across_documents=False"
    assert main(["train", "--config=configs/pretrain/test.py", workdir, packed, "--config.loop.steps=20"]) == 0
    assert main(["train", workdir, "--config.loop.steps=30"]) == 0
    assert "bfloat16 compute" in capsys.readouterr().out
    found = losses(tmp_path / "run")
    assert len(found) == 30 and found[-1] < 0.85 * found[0]
    assert main(["generate", str(tmp_path / "run"), "--prompt=To be", "--max_new_tokens=20"]) == 0
    assert capsys.readouterr().out.startswith("To be")


@pytest.mark.gpu
def test_an_encoder_decoder_with_position_biases_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fields = ("loop.steps=20", "loop.log_every_steps=1", "checkpoint.every_steps=20", "evaluate.every_steps=0")
    overrides = [f"--config.{field}" for field in (*fields, "telemetry.measure_cpu_peak=False")]
    config = "--config=configs/pretrain/t5_tiny.py"
    assert main(["train", config, f"--workdir={tmp_path / 'run'}", *overrides]) == 0
    found = losses(tmp_path / "run")
    assert len(found) == 20 and found[-1] < 0.95 * found[0]
