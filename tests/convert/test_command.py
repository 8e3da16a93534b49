"""`t5x_like convert` on a run of ours and back: steps, averaged parameters, dtypes, and what is done with both."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.convert import verify
from t5x_like.convert.layout import Span
from t5x_like.convert.safetensors import open_file
from t5x_like.core import tree

ROOT = pathlib.Path(__file__).parents[2]
_EMBEDDING = "model.embed_tokens.weight"


def _train(workdir: pathlib.Path, *arguments: str) -> None:
    fixed = ["--config=configs/pretrain/test.py", "--config.optim.schedule.warmup_steps=0"]
    assert main(["train", *fixed, f"--workdir={workdir}", *arguments]) == 0


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A workdir with checkpoints of the steps 1 and 2, averaged parameters in both."""
    workdir = tmp_path_factory.mktemp("convert") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _train(workdir, "--config.loop.steps=2", "--config.checkpoint.every_steps=1", "--config.loop.ema_decay=0.9")
    return workdir


@pytest.fixture(scope="module")
def exported(run) -> pathlib.Path:
    """The newest checkpoint as a folder of Hugging Face."""
    assert main(["convert", str(run), str(run.parent / "exported")]) == 0
    return run.parent / "exported"


def _tensor(folder: pathlib.Path, name: str) -> np.ndarray:
    with open_file(str(folder / "model.safetensors")) as tensors:
        shape = tensors.described()[name][0]
        return tensors.read(name, Span(shape, tuple((0, size) for size in shape)))


def test_a_step_and_its_average_are_chosen(run, tmp_path):
    found = []
    for step, average in ((1, []), (1, ["--ema"]), (2, []), (2, ["--ema"])):
        target = tmp_path / f"{step}{len(average)}"
        assert main(["convert", str(run), str(target), f"--checkpoint={step}", *average]) == 0
        ours = t5x_like.load(run, step=step, ema=bool(average), dtype="stored").params
        np.testing.assert_array_equal(_tensor(target, _EMBEDDING), ours["embed"]["tokens"][:259])
        found.append(_tensor(target, _EMBEDDING).tobytes())
    assert len(set(found)) == 4


def test_a_dtype_is_that_of_every_tensor_and_is_said(run, exported, tmp_path):
    assert main(["convert", str(run), str(tmp_path / "small"), "--dtype=bfloat16"]) == 0
    with open_file(str(tmp_path / "small" / "model.safetensors")) as tensors:
        assert {dtype.name for _, dtype in tensors.described().values()} == {"bfloat16"}
    expected = _tensor(exported, _EMBEDDING).astype(ml_dtypes.bfloat16)
    assert _tensor(tmp_path / "small", _EMBEDDING).tobytes() == expected.tobytes()
    settings = json.loads((tmp_path / "small" / "config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == "bfloat16"
    assert main(["convert", str(tmp_path / "small"), str(tmp_path / "ours"), "--dtype=float32"]) == 0
    params = t5x_like.load(tmp_path / "ours", dtype="stored").params
    assert {leaf.dtype.name for _, leaf in tree.leaves(params)} == {"float32"}
    np.testing.assert_array_equal(params["embed"]["tokens"][:259], expected.astype(np.float32))


def test_what_comes_back_is_inspected_generated_from_and_trained_on(run, exported, tmp_path, capsys):
    back = tmp_path / "back"
    assert main(["convert", str(exported), str(back)]) == 0
    assert main(["inspect", str(back)]) == 0
    printed = capsys.readouterr().out
    assert "llama" in printed and "huggingface llama" in printed
    texts = []
    for folder in (run, back, exported):
        assert main(["generate", str(folder), "--prompt=To be", "--temperature=0", "--max_new_tokens=20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 5
    started = ["--config.loop.steps=1", "--config.optim.learning_rate=1e-30"]
    _train(tmp_path / "next", *started, f"--config.checkpoint.init_from={back}")
    one, two = (t5x_like.load(folder).logits(np.arange(20)[None]) for folder in (run, tmp_path / "next"))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)


def test_verify_compares_with_transformers_and_fails_beyond_its_limit(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert main(["convert", str(run), str(tmp_path / "one"), "--verify"]) == 0
    assert "largest difference of logits beside transformers" in capsys.readouterr().out
    monkeypatch.setattr(verify, "LIMIT", 0.0)
    assert main(["convert", str(run), str(tmp_path / "two"), "--verify"]) == 1
