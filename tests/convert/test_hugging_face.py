"""Models of Hugging Face become ours and go back: the same bits, the same logits, the same text."""

import pathlib

import pytest
from safetensors.numpy import load_file

from t5x_like.convert import convert, verify

folders = pytest.importorskip("tests.convert.folders", reason="needs torch and transformers")


def _bits(folder: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Every tensor of a folder, read by the library of safetensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            found[name] = (value.shape, value.dtype.name, value.tobytes())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", folders.CASES)
def test_a_round_trip_changes_no_bit(name, dtype, tmp_path):
    folders.save(name, tmp_path / "theirs", dtype=dtype)
    convert.to_native(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    convert.to_huggingface(str(tmp_path / "ours"), str(tmp_path / "back"))
    before, after = _bits(tmp_path / "theirs"), _bits(tmp_path / "back")
    assert {dtype} == {kind for _, kind, _ in before.values()}
    assert before == after


@pytest.mark.parametrize("name", folders.CASES)
def test_logits_are_those_of_transformers_on_long_and_padded_rows(name, tmp_path):
    folders.save(name, tmp_path / "theirs")
    difference = verify.verify(str(tmp_path / "theirs"))
    assert 0 < difference <= verify.LIMIT
