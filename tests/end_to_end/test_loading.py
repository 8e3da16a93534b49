"""Runs whose checkpoints hold the trained part alone, and models loaded onto a mesh and in a chosen type."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.convert import convert
from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.parallel import mesh as meshes
from t5x_like.storage.model_directory import read_metadata

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS = np.arange(64).reshape(2, 32)


def _train(workdir: pathlib.Path, *arguments: str) -> None:
    fixed = ["--config=configs/pretrain/test.py", "--config.optim.schedule.warmup_steps=0"]
    assert main(["train", *fixed, f"--workdir={workdir}", *arguments]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs: a base, and the same fine-tuning of its final norm saved whole, apart, and apart with a stop."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        _train(folder / "base", "--config.loop.steps=2")
        tuning = [
            f"--config.checkpoint.init_from={folder / 'base'}",
            "--config.optim.freeze=(('final_norm/.*',False),('.*',True))",
            "--config.checkpoint.every_steps=2",
        ]
        _train(folder / "whole", "--config.loop.steps=4", *tuning)
        apart = [*tuning, "--config.checkpoint.holds=trained", "--config.optim.schedule.steps=4"]
        _train(folder / "apart", "--config.loop.steps=2", *apart)
        _train(folder / "apart", "--config.loop.steps=4", *apart)
    return folder


def test_the_trained_part_alone_resumes_and_loads_to_the_same_bits(runs):
    arrays = {
        name: read_metadata(str(runs / name / "checkpoints/4"))["arrays"]["params"] for name in ("whole", "apart")
    }
    assert list(arrays["apart"]) == ["final_norm/scale"] and len(arrays["whole"]) == 11
    rows = {
        name: [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()] for name in arrays
    }
    losses = {
        name: [(row["step"], row["train/loss"]) for row in found if "train/loss" in row] for name, found in rows.items()
    }
    assert losses["whole"] == losses["apart"] and len(losses["apart"]) == 4
    whole, apart, base = (t5x_like.load(runs / name).logits(TOKENS) for name in ("whole", "apart", "base"))
    np.testing.assert_array_equal(apart, whole)
    assert (apart != base).any()


def test_a_model_loads_onto_a_mesh(runs):
    mesh = meshes.make(meshes.MeshConfig("fsdp", "", *(None,) * 7), jax.devices()[:2])
    placed = t5x_like.load(runs / "apart", mesh=mesh)
    assert not placed.params["layers"]["mlp"]["up"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        logits = placed.logits(TOKENS)
    np.testing.assert_allclose(logits, t5x_like.load(runs / "apart").logits(TOKENS), rtol=1e-4, atol=1e-5)


def test_matrices_are_held_in_the_type_that_is_asked_for(runs):
    held = tree.flatten(t5x_like.load(runs / "base", dtype="bfloat16").params)
    assert held["layers/mlp/up"].dtype == held["embed/tokens"].dtype == jnp.bfloat16
    assert held["final_norm/scale"].dtype == held["layers/mlp_norm/scale"].dtype == jnp.float32
    with pytest.raises(UsageError, match="dtype='int3' is unknown; did you mean 'int8'"):
        t5x_like.load(runs / "base", dtype="int3")


def test_what_was_fine_tuned_apart_generates_and_needs_its_very_base(runs, tmp_path, capsys):
    ask = ["--prompt=To be", "--max_new_tokens=4", "--temperature=0"]
    texts = []
    for name in ("whole", "apart"):
        assert main(["generate", str(runs / name), *ask]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    base = (runs / "base/checkpoints/2").rename(runs / "base/checkpoints/elsewhere")
    assert main(["generate", str(runs / "apart"), *ask]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds the trained part alone and needs its base" in line and "move it back" in line
    _train(tmp_path / "other", "--config.loop.steps=2", "--config.seed=1")
    capsys.readouterr()
    shutil.copytree(tmp_path / "other/checkpoints/2", runs / "base/checkpoints/2")
    assert main(["generate", str(runs / "apart"), *ask]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "was trained on other parameters than its base" in line
    shutil.rmtree(runs / "base/checkpoints/2")
    base.rename(runs / "base/checkpoints/2")


def test_a_run_begins_with_the_parameters_of_a_hugging_face_folder(runs, tmp_path, capsys):
    convert.to_huggingface(str(runs / "base"), str(tmp_path / "folder"))
    losses = []
    for source in (runs / "base", tmp_path / "folder"):
        workdir = tmp_path / f"from-{source.name}"
        _train(workdir, "--config.loop.steps=1", f"--config.checkpoint.init_from={source}")
        losses.append(json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["train/loss"])
    assert losses[0] == losses[1]
    said = "".join(capsys.readouterr().out.split())  # lines of the screen are broken where they are long
    assert f"11of11parametersof{tmp_path / 'folder'}" in said
    fixed = ["train", "--config=configs/pretrain/test.py", f"--workdir={tmp_path / 'run'}"]
    begin = f"--config.checkpoint.init_from={tmp_path / 'folder'}"
    assert main([*fixed, begin, "--config.model.decoder.mlp=96"]) == 1
    assert "'layers/mlp/down' is [2, 64, 32] there and [2, 96, 32] here" in capsys.readouterr().err
    apart = ["--config.checkpoint.holds=trained", "--config.optim.freeze=(('final_norm/.*',False),('.*',True))"]
    assert main([*fixed, begin, *apart]) == 2
    assert "needs a base in our own form" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("platforms", [{}, {"JAX_PLATFORMS": ""}], ids=["unset", "empty"])
def test_loading_a_model_is_quiet_where_libtpu_is_installed_and_no_tpu_is_there(runs, platforms):
    pytest.importorskip("libtpu")
    program = "import sys, t5x_like; print(t5x_like.load(sys.argv[1]).platform)"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-c", program, str(runs / "base")]
    environment |= platforms
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "cpu\n" and done.stderr == ""
