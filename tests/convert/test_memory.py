"""A conversion needs a few hundred MB whatever the size of the model, in both directions."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.convert import native
from t5x_like.convert.families import llama
from t5x_like.convert.layout import Span
from t5x_like.convert.safetensors import open_file
from t5x_like.convert.settings import Settings
from t5x_like.core import tree
from t5x_like.storage import model_directory
from t5x_like.storage.checkpoint import Checkpoints
from tests.convert import synthetic

LIMIT = 150_000_000  # above the interpreter with its libraries; measured: 85 MB
ROOT = pathlib.Path(__file__).parents[2]


def _run(name: str, source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests" / "convert" / "synthetic.py"), name, str(source), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _both_ways(folder: pathlib.Path, *, size: int, dtype: str) -> list[dict[str, float]]:
    synthetic.write(folder / "theirs", size=size, dtype=dtype)
    measured = [_run("to_native", folder / "theirs", folder / "ours")]
    measured += [_run("to_huggingface", folder / "ours", folder / "back")]
    assert sum(file.stat().st_size for file in (folder / "theirs").iterdir()) > 0.8 * size > 1.5 * LIMIT
    return measured


@pytest.mark.parametrize(
    "size, dtype",
    [
        pytest.param(1_000_000_000, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2_000_000_000, "float32", marks=pytest.mark.slow),
        pytest.param(6_000_000_000, "float32", marks=pytest.mark.slow),
    ],
)
def test_the_peak_does_not_depend_on_the_size_of_the_model(size, dtype, tmp_path):
    for measured in _both_ways(tmp_path, size=size, dtype=dtype):
        assert measured["peak"] - measured["before"] < LIMIT, measured


def test_a_model_of_many_pieces_comes_back_alike_and_is_never_held_whole(tmp_path):
    for measured in _both_ways(tmp_path, size=700_000_000, dtype="float32"):
        assert measured["peak"] - measured["before"] < LIMIT, measured
    with open_file(str(tmp_path / "theirs" / "model.safetensors")) as before:
        with open_file(str(tmp_path / "back" / "model.safetensors")) as after:
            assert before.described() == after.described()
            for name, (shape, _) in before.described().items():
                whole = Span(shape, tuple((0, size) for size in shape))
                assert before.read(name, whole).tobytes() == after.read(name, whole).tobytes(), name


def _write_run(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """The newest checkpoint of a run, by the writer that runs use; returns its parameters by path."""
    said = {
        **{"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 512},
        **{"tie_word_embeddings": False},
    }
    config = native.model_config("llama", llama.section(Settings(said, "test", ())), dtype="float32", where="test")
    specs = native.model_specs(config)
    noise = np.random.default_rng(0).standard_normal(1_000_003).astype(np.float32)
    arrays = {path: np.resize(noise, spec.shape) for path, spec in specs.items()}
    metadata = {
        "config": {"model": json.loads(json.dumps(dataclasses.asdict(config)))},
        "axes": {"params": {path: list(spec.axes) for path, spec in specs.items()}},
    }
    with Checkpoints(str(workdir / model_directory.CHECKPOINTS), asynchronous=False) as checkpoints:
        params = tree.unflatten({path: jnp.asarray(array) for path, array in arrays.items()})
        assert checkpoints.save(7, {"params": params}, metadata)
    return arrays


def test_the_peak_of_converting_a_run_is_below_its_size(tmp_path):
    arrays = _write_run(tmp_path / "run")
    assert sum(array.nbytes for array in arrays.values()) > 1.7 * LIMIT
    measured = _run("to_huggingface", tmp_path / "run", tmp_path / "theirs")
    assert measured["peak"] - measured["before"] < LIMIT, measured
    with open_file(str(tmp_path / "theirs" / "model.safetensors")) as tensors:
        for name, expected in {
            "lm_head.weight": arrays["head/weight"],
            "model.layers.2.mlp.down_proj.weight": arrays["layers/mlp/down"][2].T,
        }.items():
            shape = tensors.described()[name][0]
            found = tensors.read(name, Span(shape, tuple((0, size) for size in shape)))
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_the_measured_peak_is_that_of_the_child_alone():
    """A child inherits `ru_maxrss`: after a large test, any conversion would seem to need nothing."""
    command = [sys.executable, "-c", "from tests.convert import synthetic; print(synthetic.peak_bytes())"]
    ballast = np.ones(500_000_000, np.uint8)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < ballast.nbytes
