"""Models held in int8: read from directories of either form, generating, on a mesh, saved and read again."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.compress.quant_array import QuantArray
from t5x_like.convert import convert
from t5x_like.core import tree
from t5x_like.parallel import mesh as meshes
from t5x_like.storage import model_directory
from t5x_like.storage.checkpoint import Checkpoints
from tests.convert import folders, synthetic, test_memory

STORIES = pathlib.Path(__file__).parents[1] / "data" / "stories260K"
ROOT = pathlib.Path(__file__).parents[2]
TOKENS = np.arange(3, 67).reshape(2, 32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of Hugging Face and model directory of ours, of a decoder and of an encoder-decoder."""
    root = tmp_path_factory.mktemp("models")
    folders.save("t5_gated", root / "t5-theirs")
    found = {"llama": STORIES, "t5": root / "t5-theirs"}
    for name, folder in found.items():
        convert.to_native(str(folder), str(root / name))
    return {name: (folder, root / name) for name, folder in found.items()}


def _same(one, two):
    for (path, a), (_, b) in zip(tree.leaves(one), tree.leaves(two), strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b), path
        for part, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert part.dtype == other.dtype
            np.testing.assert_array_equal(part, other, err_msg=path)


def _logits(model):
    return model.logits(TOKENS, TOKENS[:, ::-1] if model.has_encoder else None)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_both_forms_give_the_same_bits_and_the_logits_of_the_written_out_weights(name, models):
    plain, *int8 = (t5x_like.load(models[name][1]), *(t5x_like.load(each, dtype="int8") for each in models[name]))
    _same(int8[0].params, int8[1].params)
    quantized = {path for path, leaf in tree.leaves(int8[0].params) if isinstance(leaf, QuantArray)}
    floats = {path: leaf.ndim for path, leaf in tree.leaves(int8[0].params) if path not in quantized}
    assert "embed/tokens" in quantized and all(path.endswith(("scale", "table")) for path in floats)
    dense = tree.map_with_path(lambda path, leaf: leaf.dense("float32") if path in quantized else leaf, int8[0].params)
    written = dataclasses.replace(plain, params=dense)
    found, expected = _logits(int8[1]), _logits(written)
    largest = np.abs(expected).max()
    assert np.abs(_logits(plain) - expected).max() > 1e-3 * largest
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)
    texts = [model.generate(["Once upon a time"], max_new_tokens=12, temperature=0) for model in (int8[0], written)]
    assert texts[0] == texts[1] and len(texts[0][0]) > 0


def test_the_command_takes_the_type_and_names_a_typo(models, capsys):
    ask = ["--prompt=Once upon a time", "--max_new_tokens=8", "--temperature=0"]
    assert main(["generate", str(models["llama"][0]), *ask, "--dtype=int8"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was")
    assert main(["generate", str(models["llama"][0]), *ask, "--dtype=int9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "dtype='int9' is unknown; did you mean 'int8'" in line


def test_on_a_mesh_the_parts_lie_as_the_weight_and_give_the_same_logits(models):
    mesh = meshes.make(meshes.MeshConfig("fsdp", "", *(None,) * 7), jax.devices()[:2])
    placed = t5x_like.load(models["llama"][1], mesh=mesh, dtype="int8")
    up = placed.params["layers"]["mlp"]["up"]
    assert not up.values.sharding.is_fully_replicated and up.scale.shape == (5, 1, 172)
    with jax.set_mesh(mesh):
        logits = placed.logits(TOKENS)
    np.testing.assert_allclose(logits, t5x_like.load(models["llama"][1], dtype="int8").logits(TOKENS), atol=1e-4)


def test_a_checkpoint_holds_such_leaves_and_is_read_back_without_being_told(models, tmp_path, capsys):
    model = t5x_like.load(models["llama"][1], dtype="int8")
    note = model_directory.read_metadata(str(models["llama"][1] / "checkpoints/0"))
    metadata = {name: note[name] for name in ("provenance", "axes")} | {"config": note["config"]}
    metadata = json.loads(json.dumps(metadata))
    with Checkpoints(str(tmp_path / "int8/checkpoints"), asynchronous=False) as checkpoints:
        assert checkpoints.save(1, {"params": model.params}, metadata)
    (tmp_path / "int8/tokenizer").symlink_to(models["llama"][1] / "tokenizer")
    for dtype in ("compute", "int8", "stored"):
        _same(t5x_like.load(tmp_path / "int8", dtype=dtype).params, model.params)
    assert main(["inspect", str(tmp_path / "int8")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "layers/mlp/up 5x64x172 layers embed mlp int8+float32 int8".split() == next(
        line[:7] for line in lines if line[:1] == ["layers/mlp/up"]
    )


def test_reading_and_exporting_hold_little_more_than_the_int8(tmp_path):
    """Processes of their own read a float32 model of 700 MB from either form: 176 MB of int8 and a few pieces."""
    synthetic.write(tmp_path / "theirs", size=600_000_000, dtype="float32")
    convert.to_native(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    for name in ("theirs", "ours"):
        command = [sys.executable, str(ROOT / "tests" / "compress" / "peak.py"), str(tmp_path / name)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout.splitlines()[-1])
        assert 140_000_000 < measured["int8"] < 180_000_000 and measured["floats"] < 1_000_000
        assert measured["peak"] - measured["before"] - measured["int8"] < 150_000_000, (name, measured)
    measured = test_memory._run("export", tmp_path / "ours", tmp_path / "out")
    assert measured["peak"] - measured["before"] < 1.3 * test_memory.LIMIT, measured
    floats = 2 * 4 * 32_000 * 2048  # embedding and head
    layers = sum(file.stat().st_size for file in (tmp_path / "theirs").iterdir()) - floats
    assert 0.25 * layers < (tmp_path / "out/model.safetensors").stat().st_size - floats < 0.26 * layers
