"""Models of Hugging Face become ours and go back: the same bits, the same logits, the same text."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import t5x_like
from t5x_like.convert import convert, verify
from t5x_like.inference import decode
from t5x_like.inference.sampling import Sampling

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


@pytest.mark.parametrize("name", ["llama_grouped", "gpt2"])
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    import torch

    theirs = folders.save(name, tmp_path / "theirs")
    prompts = np.random.default_rng(1).integers(3, 500, (2, 9)).tolist()
    # No token ends a text: the weights are random.
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=64, pad_token_id=0)
    ours = t5x_like.load(tmp_path / "theirs")
    found = decode.generate(ours.model, ours.params, prompts, max_new_tokens=64, sampling=Sampling(0.0, 0, 1.0), seed=0)
    for row, wanted in zip(found, expected.tolist(), strict=True):
        assert [int(token) for token in row] == wanted[9:]


def test_a_tied_t5_without_scale_is_read_alike_by_every_version(tmp_path):
    """Version 4 takes a T5 that ties its head for one that scales logits: the head is written a second time."""
    folders.save("t5", tmp_path / "theirs")
    place = tmp_path / "theirs" / "config.json"
    settings = json.loads(place.read_text()) | {"scale_decoder_outputs": False, "tie_word_embeddings": False}
    place.write_text(json.dumps(settings))
    assert verify.verify(str(tmp_path / "theirs")) <= verify.LIMIT
    convert.to_native(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    convert.to_huggingface(str(tmp_path / "ours"), str(tmp_path / "back"))
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert tensors["lm_head.weight"].tobytes() == tensors["shared.weight"].tobytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify.verify(str(tmp_path / "back")) <= verify.LIMIT
