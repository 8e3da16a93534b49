"""`inspect` shows every parameter with its logical shape, axes and size, and where the checkpoint comes from."""

import json

import jax.numpy as jnp
import pytest

from t5x_like.__main__ import main
from t5x_like.commands.inspect import describe
from t5x_like.core import formats
from t5x_like.runs.arguments import load_config
from t5x_like.storage.checkpoint import Checkpoints
from tests.storage.quantized import Quantized


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    weight = Quantized(jnp.ones((4, 8), jnp.int8), jnp.ones((1, 8)), ("embed", "mlp"))
    params = {"layers": {"up": weight, "norm": jnp.ones((2, 4), jnp.bfloat16)}, "scale": jnp.ones(())}
    metadata = {
        "config": {},
        "axes": {"params": {"layers/norm": ["layers", None], "scale": []}},
        "provenance": {"data": "d41d8c", "revision": {"commit": "abc", "changed": True}},
    }
    with Checkpoints(str(root / "checkpoints")) as checkpoints:
        for step in (5, 10):
            items = {"params": params, "optimizer": {"count": jnp.int32(step), "mu": jnp.ones(1024)}}
            checkpoints.save(step, items, metadata, metrics={"validation/loss": 2.5})
    return root


def test_every_parameter_is_a_row_with_its_logical_shape(workdir, capsys):
    assert main(["inspect", str(workdir)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layers/norm", "2x4", "layers", "-", "bfloat16", "array", "8", "16", "B"] in lines
    assert ["layers/up", "4x8", "embed", "mlp", "int8+float32", "quantized", "32", "64", "B"] in lines
    assert ["scale", "scalar", "-", "float32", "array", "1", "4", "B"] in lines
    assert "params: 41 parameters (41) in 3 arrays, 84 B".split() in lines
    assert "optimizer: 2 arrays, 4.00 KiB".split() in lines
    assert ["validation/loss", "2.5"] in lines and ["data", "d41d8c"] in lines
    assert ["revision.commit", "abc"] in lines and ["other", "checkpoints:", "5"] in lines


def test_an_older_checkpoint_and_one_alone_can_be_shown(workdir, capsys):
    assert main(["inspect", str(workdir), "--checkpoint=5"]) == 0
    assert "(step 5, saved " in capsys.readouterr().out
    assert "(step 5, saved " in next(iter(describe(str(workdir / "checkpoints" / "5"))))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{root}/nothing"], 1, "is no model directory"),
        (["{root}", "--checkpoint=7"], 1, "no checkpoint of step 7; it has 5, 10"),
        (["{root}", "--checkpoint=5", "--step=3"], 2, "give one of them"),
        (["{root}", "--step=0"], 2, "--step=0 should be at least 1"),
        (["{root}", "--step=3"], 1, "holds no config.json"),
        ([], 2, "directory"),
    ],
)
def test_wrong_use_is_one_line(workdir, capsys, arguments, status, message):
    assert main(["inspect", *(argument.format(root=workdir) for argument in arguments)]) == status
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("step", [41, 999999999999999999999])
def test_a_step_that_the_run_does_not_have_is_one_line(tmp_path, capsys, step):
    config, _ = load_config(["--config=configs/pretrain/test.py"])
    (tmp_path / "config.json").write_text(json.dumps(formats.stored(config)))
    assert main(["inspect", str(tmp_path), f"--step={step}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"t5x_like: --step={step}: the run in {tmp_path} has 40 steps (config.loop.steps)"
