"""Exported folders: read by transformers with compressed-tensors and by us, with weights equal bit for bit."""

import json
import re
import subprocess

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import t5x_like
from t5x_like.__main__ import main
from t5x_like.compress.quant_array import QuantArray
from t5x_like.convert import checksums, convert, export, verify
from t5x_like.core import tree
from tests.convert import folders, native

# In dims of `in` that no word of four values divides, and with grouped heads, biases and a tied head.
_ODD = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
CASES = {
    "llama": ("float32", {}),
    "llama_one_layer_tied": ("float32", {}),
    "llama_grouped": ("bfloat16", {}),
    "llama_biases": ("float32", _ODD),
}
_LINEAR = {
    "self_attn.q_proj": ("attention/q", lambda w: w.reshape(w.shape[0], -1).T),
    "self_attn.v_proj": ("attention/v", lambda w: w.reshape(w.shape[0], -1).T),
    "self_attn.o_proj": ("attention/o", lambda w: w.reshape(-1, w.shape[-1]).T),
    "mlp.gate_proj": ("mlp/gate", lambda w: w.T),
    "mlp.down_proj": ("mlp/down", lambda w: w.T),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """name -> (model directory of ours, its export in int8, float type), each made once."""
    made = {}

    def of(name):
        if name not in made:
            root, (dtype, fields) = tmp_path_factory.mktemp(name), CASES[name]
            with pytest.MonkeyPatch.context() as patch:
                kind, usual = folders.CASES[name]
                patch.setitem(folders.CASES, name, (kind, usual | fields))
                folders.save(name, root / "theirs", dtype=dtype)
            convert.to_native(str(root / "theirs"), str(root / "ours"))
            assert main(["export", str(root / "ours"), str(root / "out"), "--format=compressed-tensors"]) == 0
            made[name] = root / "ours", root / "out", dtype
        return made[name]

    return of


@pytest.fixture
def exported(make):
    return make("llama")


def _transformers(folder, dtype, **settings):
    transformers.logging.disable_progress_bar()
    kind = getattr(torch, dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **settings).eval()


def _numpy(tensor):
    return tensor.to(torch.float32).numpy()  # exact, from bfloat16 too


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_our_very_weights(name, make):
    ours, out, dtype = make(name)
    read = _transformers(out, dtype, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    theirs = read.state_dict()
    held, before = (tree.flatten(t5x_like.load(folder, dtype="stored").params) for folder in (out, ours))
    quantized = {path for path, leaf in held.items() if isinstance(leaf, QuantArray)}
    assert quantized == {path for path in held if re.fullmatch(r"layers/(attention/[qkvo]|mlp/(gate|up|down))", path)}
    for layer in range(read.config.num_hidden_layers):
        for module, (path, as_theirs) in _LINEAR.items():
            found = _numpy(theirs[f"model.layers.{layer}.{module}.weight"])
            leaf = held[f"layers/{path}"]
            np.testing.assert_array_equal(found, as_theirs(np.asarray(leaf.dense(dtype), np.float32)[layer]))
            source = as_theirs(np.asarray(before[f"layers/{path}"], np.float32)[layer])
            assert 0 < np.abs(found - source).max() <= 0.52 * np.max(leaf.scale)
    for path in held.keys() - quantized:
        np.testing.assert_array_equal(held[path], before[path])
    tokens = np.arange(3, 67).reshape(2, 32)
    if dtype == "float32":
        with torch.no_grad():
            expected = read(torch.from_numpy(tokens)).logits.numpy()
        assert np.abs(t5x_like.load(ours).logits(tokens) - expected).max() > 1e-3
        np.testing.assert_allclose(t5x_like.load(out).logits(tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_without_being_told_transformers_multiplies_with_the_same(exported):
    _, out, dtype = exported
    tokens = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        one = _transformers(out, dtype)(tokens).logits
        config = transformers.CompressedTensorsConfig(dequantize=True)
        two = _transformers(out, dtype, quantization_config=config)(tokens).logits
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama_grouped", "llama_biases"])
def test_what_is_exported_is_what_int8_loads_and_other_forms_are_read(name, make, tmp_path):
    ours, out, dtype = make(name)
    if dtype == "float32":  # else scales are rounded to the folder's type
        one, two = (t5x_like.load(folder, dtype="int8").params for folder in (ours, out))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(a, b)
    tensors = dict(load_file(out / "model.safetensors"))
    settings = json.loads((out / "config.json").read_text())
    for name in [name for name in tensors if name.endswith("_packed")]:
        weight = name.removesuffix("_packed")
        out_dim, in_dim = tensors.pop(f"{weight}_shape")
        bytes_ = tensors.pop(name).view(np.uint8).reshape(out_dim, -1)[:, :in_dim]
        tensors[weight] = (bytes_.astype(np.int16) - 128).astype(np.int8)
    tmp_path.joinpath("integers").mkdir()
    save_file(tensors, tmp_path / "integers/model.safetensors")
    settings["quantization_config"]["format"] = "int-quantized"
    (tmp_path / "integers/config.json").write_text(json.dumps(settings))
    plain = {}
    for name, folder in {"packed": out, "integers": tmp_path / "integers"}.items():
        convert.to_native(str(folder), str(tmp_path / name / "floats"))
        plain[name] = native.leaves(tmp_path / name / "floats")
    held = tree.flatten(t5x_like.load(out, dtype="stored").params)
    for path, array in plain["packed"].items():
        np.testing.assert_array_equal(array, plain["integers"][path])
        leaf = held[path]
        expected = leaf.dense(dtype) if isinstance(leaf, QuantArray) else leaf
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(expected, np.float32))


def test_the_settings_are_those_of_the_package_and_of_vllm(exported):
    from compressed_tensors.quantization import QuantizationConfig

    _, out, dtype = exported
    said = json.loads((out / "config.json").read_text())
    assert said["dtype"] == dtype
    config = QuantizationConfig.model_validate(said["quantization_config"])
    weights = config.config_groups["group_0"].weights
    # What vLLM's WNA16 asks for: this format, weights alone, static, by channel, 2 to 8 bits.
    assert config.format == "pack-quantized" and weights.num_bits == 8 and not weights.dynamic
    assert weights.strategy == "channel" and weights.symmetric and weights.actorder is None
    assert config.config_groups["group_0"].input_activations is None


def test_another_float_type_is_that_of_scales_and_of_the_rest(exported, tmp_path):
    ours, _, _ = exported
    assert main(["export", str(ours), str(tmp_path / "half"), "--format=compressed-tensors", "--dtype=bfloat16"]) == 0
    read = _transformers(
        tmp_path / "half", "bfloat16", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    leaf = t5x_like.load(tmp_path / "half").params["layers"]["mlp"]["down"]
    np.testing.assert_array_equal(
        _numpy(read.state_dict()["model.layers.0.mlp.down_proj.weight"]),
        np.asarray(leaf.dense("bfloat16"), np.float32)[0].T,
    )


def test_a_plain_export_is_a_conversion_with_card_and_checksums(exported, tmp_path, capsys):
    ours, _, _ = exported
    assert main(["export", str(ours), str(tmp_path / "plain"), "--format=hf"]) == 0
    convert.to_huggingface(str(ours), str(tmp_path / "converted"))
    names = {path.name for path in (tmp_path / "converted").iterdir()}
    assert {path.name for path in (tmp_path / "plain").iterdir()} == names | {"README.md", "SHA256SUMS"}
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", checksums.NAME], cwd=tmp_path / "plain", check=True)
    lines = (tmp_path / "plain/README.md").read_text().splitlines()
    assert lines[0] == "---" and "pipeline_tag: text-generation" in lines and "# ours" in lines
    assert any(line.startswith("- base: ") and line.endswith("/theirs") for line in lines)
    assert any(line.startswith("Unknown: ") for line in lines)
    assert verify.verify(str(tmp_path / "plain")) <= verify.LIMIT


def test_an_export_that_fails_leaves_nothing(exported, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(export.checksums, "write", fail)
    with pytest.raises(OSError, match="no space"):
        main(["export", str(exported[0]), str(tmp_path / "out"), "--format=hf"])
    assert not list(tmp_path.iterdir())


def test_a_run_has_its_training_on_the_card():
    note = {
        "config": {
            "model": {"architecture": "decoder", "family": "llama"},
            "data": {"source": "text:a.txt", "batch_size": 8, "length": 64},
            "checkpoint": {"init_from": "runs/base", "branch_from": ""},
            "loop": {"steps": 5},
        },
        "step": 5,
        "time": 0.0,
        "metrics": {"validation/loss": 2.5},
    }
    starts = [{"time": "2026-01-01", "data": "abc", "devices": 4, "platform": "tpu", "config_sha256": "12"}]
    text = export.model_card.text("mine", note, starts, form="in plain float32", parameters=1000)
    for line in ("base: runs/base", "data: text:a.txt", "steps: 5", "devices: 4 (tpu)", "validation/loss: 2.5"):
        assert f"\n- {line}\n" in text
    assert "## Licence\n\nUnknown" in text
