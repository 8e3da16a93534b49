"""Claims about tools/gpu_report.py where there is no GPU: the table, the limits, and that its parts run."""

import json
import sys
import time
import zipfile

import pytest

from tools import gpu_report

TESTS = {"counts": {"passed": 3, "failed": 1}, "failed": ["tests/test_x.py::test_y"]}
TRAIN = {"seconds": 0.5, "tokens": 1000, "flops": 1e14, "first": 40.0, "loss": 11.7, "peak": 989e12, "device": "H100"}
DECODE = {"tokens_per_second": {"1": 250.4, "16": 3000.0}, "parameters": 1.236e9}


BESIDE = {
    "packed": TRAIN,
    "lora": {"seconds": 0.4, "tokens": 1000},
    "grpo": {
        "seconds": 2.0,
        "answers": 16,
        "tokens": 400,
        "rollout": 1.0,
        "reward": 0.1,
        "scoring": 0.0,
        "update": 0.9,
    },
    "train_torch": {"seconds": 1.0, "tokens": 1000},
    "decode_torch": DECODE,
}


def stub(results):
    """A runner that answers by the part that is asked for; None is a part that goes past its limit."""
    limits = []

    def run(command, limit):
        name = next(word for word in command if word.startswith("--work=")).removeprefix("--work=")
        limits.append(limit)
        result = results[name]
        return (None, "") if result is None else (0, "noise\n" + json.dumps(result))

    return run, limits


def outcomes(results, left=1000.0):
    run, limits = stub(BESIDE | results)
    return {
        name: gpu_report.attempt(part, "tiny", left=left, run=run) for name, part in gpu_report.PARTS.items()
    }, limits


def test_the_table_holds_what_each_part_found():
    found, limits = outcomes({"tests": TESTS, "train": TRAIN, "decode": DECODE})
    text = gpu_report.table(found, heading="today")
    for row in (
        "| GPU tests | pytest -m gpu | 3 passed, 1 failed |",
        "| GPU tests | failed | tests/test_x.py::test_y |",
        "| training | step | 0.5000 s, 2000 tokens/s |",
        "| training | MFU, bf16 | 200.00 TFLOP/s, 20.2% of 989 TFLOP/s |",
        "| decoding | 16 rows | 3000 tokens/s |",
        "| GRPO | iteration | 2.00 s, 8.0 answers/s, 200 tokens/s |",
        "| GRPO | rollout | 50% |",
        "| training, transformers | step | 1.0000 s, 1000 tokens/s |",
    ):
        assert row in text.splitlines()
    assert limits == [part.seconds for part in gpu_report.PARTS.values()]


def test_a_part_past_its_limit_is_a_line_and_the_others_report():
    found, _ = outcomes({"tests": TESTS, "train": None, "decode": DECODE})
    text = gpu_report.table(found, heading="today")
    assert f"| training | failed | ended after its limit of {gpu_report.PARTS['train'].seconds} s |" in text
    assert "| decoding | 1 rows | 250 tokens/s |" in text


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ((1, "a\nRuntimeError: out of memory\nsee above\n"), "status 1: RuntimeError: out of memory"),
        ((0, "no json"), "no result in its output: no json"),
        ((0, ""), "no result in its output: nothing"),
    ],
)
def test_what_went_wrong_is_said_in_one_line(answer, failure):
    outcome = gpu_report.attempt(gpu_report.PARTS["train"], "tiny", left=100, run=lambda command, limit: answer)
    assert outcome.failure == failure


def test_all_limits_together_are_the_nine_minutes():
    unpacking = 60
    assert unpacking + sum(part.seconds for part in gpu_report.PARTS.values()) == gpu_report.SECONDS == 540
    _, limits = outcomes({"tests": TESTS, "train": TRAIN, "decode": DECODE}, left=70.0)
    assert limits == [min(70.0, part.seconds) for part in gpu_report.PARTS.values()]
    found, limits = outcomes({"tests": TESTS, "train": TRAIN, "decode": DECODE}, left=0.0)
    assert not limits and all("not started" in outcome.failure for outcome in found.values())


def test_a_process_and_its_children_end_at_the_limit(tmp_path):
    child = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    begin = time.monotonic()
    status, text = gpu_report._runner(tmp_path, "train", tmp_path)([sys.executable, "-c", child], 1.0)
    assert status is None and "begun" in text and time.monotonic() - begin < 20
    assert (tmp_path / "train.log").read_text() == text


def test_wheels_of_missing_packages_alone_are_unpacked(tmp_path):
    for name in ("numpy", "surely_missing"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
            )
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    assert gpu_report.install_missing(tmp_path, tmp_path / "site") == "From wheels: surely_missing."
    assert (tmp_path / "site/surely_missing.py").exists() and not (tmp_path / "site/numpy.py").exists()
    assert gpu_report.install_missing(tmp_path / "none", tmp_path / "site") == "All packages were there."


_SLOW = ("decode", "grpo")  # their programs are those of inference/ and rl/, their rows those of the stubs above


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW))
        for name in ("train", "lora", "packed", "decode", "grpo", "train_torch", "decode_torch")
    ],
)
def test_the_parts_run_on_a_tiny_model(name):
    result = gpu_report.WORK[name](gpu_report.SHAPES["tiny"])
    rows = dict(gpu_report.PARTS[name].rows(json.loads(json.dumps(result))))
    if name in ("train", "packed"):
        assert "unknown" in rows["MFU, bf16"]
    elif name == "grpo":
        assert rows["iteration"].endswith("tokens/s") and 0 < result["rollout"] < result["seconds"]
    else:
        assert set(rows) == ({"step"} if name in ("lora", "train_torch") else {"parameters", "1 rows", "2 rows"})
    if name == "packed":
        assert result["loss"] != gpu_report.WORK["train"](gpu_report.SHAPES["tiny"])["loss"]
