"""A conversion needs a few hundred MB whatever the size of the model, in both directions."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from t5x_like.convert.layout import Span
from t5x_like.convert.safetensors import open_file
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
        (1_000_000_000, "bfloat16"),
        pytest.param(2_000_000_000, "float32", marks=pytest.mark.slow),
        pytest.param(6_000_000_000, "float32", marks=pytest.mark.slow),
    ],
)
def test_the_peak_does_not_depend_on_the_size_of_the_model(size, dtype, tmp_path):
    for measured in _both_ways(tmp_path, size=size, dtype=dtype):
        assert measured["peak"] - measured["before"] < LIMIT, measured


def test_a_model_of_many_pieces_comes_back_alike(tmp_path):
    _both_ways(tmp_path, size=700_000_000, dtype="float32")
    with open_file(str(tmp_path / "theirs" / "model.safetensors")) as before:
        with open_file(str(tmp_path / "back" / "model.safetensors")) as after:
            assert before.described() == after.described()
            for name, (shape, _) in before.described().items():
                whole = Span(shape, tuple((0, size) for size in shape))
                assert before.read(name, whole).tobytes() == after.read(name, whole).tobytes(), name
