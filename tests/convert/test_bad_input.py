"""Whatever is wrong with a foreign model is one line that names it, and nothing half-written is left."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5x_like import __main__ as program

STORIES = pathlib.Path(__file__).parents[1] / "data" / "stories260K"
_NAME = "model.layers.2.mlp.up_proj.weight"


def _change(folder: pathlib.Path, change) -> None:
    tensors = dict(load_file(folder / "model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _config(folder: pathlib.Path, **fields) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))


def _unmapped(folder):
    _change(folder, lambda tensors: tensors.update({"model.layers.2.extra": np.ones(2, np.float32)}))


def _missing(folder):
    _change(folder, lambda tensors: tensors.pop(_NAME))


def _misshapen(folder):
    _change(folder, lambda tensors: tensors.update({_NAME: tensors[_NAME].T.copy()}))


def _nan(folder):
    def change(tensors):
        tensors[_NAME][3, 4] = np.nan

    _change(folder, change)


def _quantized(folder):
    _change(folder, lambda tensors: tensors.update({_NAME: tensors[_NAME].astype(np.int8)}))


def _untied(folder):
    _change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))


def _truncated(folder):
    place = folder / "model.safetensors"
    place.write_bytes(place.read_bytes()[:-4])


def _header_too_large(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def _header_no_json(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"{'a': 1}")


def _overlapping(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry | {"data_offsets": [4, 12]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))


def _escaping(folder):
    index = {"weight_map": {_NAME: "../stories/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


CASES = {
    "unmapped": (_unmapped, "'model.layers.2.extra' is unknown to this family"),
    "missing": (_missing, f"'{_NAME}' is missing"),
    "misshapen": (_misshapen, f"'{_NAME}' has the shape [64, 172], expected [172, 64]"),
    "nan": (_nan, f"'{_NAME}' holds NaN or infinity"),
    "quantized": (_quantized, f"'{_NAME}' is stored as int8"),
    "untied": (_untied, "'lm_head.weight' differs from 'model.embed_tokens.weight'"),
    "truncated": (_truncated, "the file is truncated"),
    "header too large": (_header_too_large, "a header of 1,099,511,627,776 bytes"),
    "header no json": (_header_no_json, "its header describes no tensors"),
    "overlapping": (_overlapping, "the bytes of 'b' and 'a' overlap"),
    "escaping": (_escaping, "'../stories/model.safetensors' is no name of a safetensors file in its folder"),
    "pickled": (_pickled, "save_pretrained() writes safetensors"),
    "no weights": (_no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
    "family": (lambda folder: _config(folder, model_type="llame"), "model_type='llame' is not converted yet"),
    "activation": (lambda folder: _config(folder, hidden_act="mish"), "hidden_act='mish' is unknown"),
    "rope": (lambda folder: _config(folder, rope_parameters={"rope_type": "dynamic"}), "rope_type='dynamic'"),
    "yarn of no factor": (lambda folder: _config(folder, rope_parameters={"rope_type": "yarn"}), "lack the number"),
    "heads": (lambda folder: _config(folder, num_key_value_heads=3), "kv_heads=3 does not divide"),
    "layers": (lambda folder: _config(folder, num_hidden_layers=-1), "num_hidden_layers is -1"),
    "quantization": (lambda folder: _config(folder, quantization_config={}), "quantization_config is set"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_model_is_one_line_and_leaves_nothing(name, tmp_path, capsys):
    change, expected = CASES[name]
    source = tmp_path / "source"
    shutil.copytree(STORIES, source)
    change(source)
    assert program.main(["convert", str(source), str(tmp_path / "target")]) == 1
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1, printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"PK\x03\x04" + bytes(400), "is a pickled file"),
        (bytes(400), "is no llama2.c checkpoint"),
        (struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512) + bytes(400), "bytes, expected"),
        (b"24ka" + struct.pack("<i", 2) + bytes(400), "version 0 or 1"),
        (b"\x82\xa7version\x03", "is no whole T5X checkpoint"),
    ],
)
def test_a_bad_file_is_one_line(content, expected, tmp_path, capsys):
    (tmp_path / "model.bin").write_bytes(content)
    assert program.main(["convert", str(tmp_path / "model.bin"), str(tmp_path / "target")]) == 1
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1, printed
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--to=hf"], "has the form hf already"),
        (["--dtype=float8"], "--dtype='float8' is unknown"),
        (["--ema"], "are about model directories of this program"),
    ],
)
def test_wrong_use_is_status_2(arguments, expected, tmp_path, capsys):
    assert program.main(["convert", str(STORIES), str(tmp_path / "target"), *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert program.main(["convert", str(STORIES), str(tmp_path)]) == 2
    assert (
        tmp_path / "mine"
    ).read_text() == "kept" and "exists; give the name of a new folder" in capsys.readouterr().err
