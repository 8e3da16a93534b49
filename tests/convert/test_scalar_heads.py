"""Reward models there and back: transformers' classifiers of one label, at the last token."""

import json

import numpy as np
import pytest

import t5x_like
from t5x_like.convert import convert, native
from t5x_like.convert.families import FAMILIES
from t5x_like.core.errors import UserError
from t5x_like.inference.heads import read_last
from tests.convert.native import leaves

torch = pytest.importorskip("torch", reason="beside transformers on torch, of the extra [test]")
folders = pytest.importorskip("tests.convert.folders", reason="needs torch and transformers")

TOKENS = np.random.default_rng(0).integers(3, 500, (3, 9)).tolist()


def classifier(kind, fields):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**fields, num_labels=1, pad_token_id=None)
    return folders.randomized(getattr(transformers, f"{kind}ForSequenceClassification")(config)).eval()


def scores(model):
    with torch.no_grad():
        return np.array([model(torch.tensor([row])).logits.item() for row in TOKENS])


@pytest.mark.parametrize("name", ["llama_grouped", "llama_one_layer_tied", "qwen2", "gpt2"])
def test_rewards_are_those_of_transformers_there_and_back(name, tmp_path):
    import transformers

    kind, fields = folders.CASES[name]
    theirs = classifier(kind, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    convert.to_native(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    expected = scores(theirs)
    assert np.ptp(expected) > 1e-2 * np.abs(expected).max()
    convert.to_huggingface(str(tmp_path / "ours"), str(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == [f"{kind}ForSequenceClassification"] and written["id2label"] == {"0": "reward"}
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").eval()
    assert np.abs(scores(again) - expected).max() <= 1e-6 * np.abs(expected).max()
    head = leaves(tmp_path / "ours")["heads/reward/weight"]
    assert np.array_equal(head, theirs.score.weight.detach().numpy()[0])


def test_ours_reads_the_last_token_as_transformers_does(tmp_path):
    kind, fields = folders.CASES["llama_grouped"]
    theirs = classifier(kind, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / file).write_bytes((folders.STORIES / file).read_bytes())
    ours = t5x_like.load(tmp_path / "theirs", dtype="float32")
    found, expected = read_last(ours.model, ours.params, TOKENS, sources=None, head="reward"), scores(theirs)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max() and np.ptp(expected) > 0


def test_t5_with_a_head_is_one_line():
    stack = {"layers": 1, "heads": 2, "kv_heads": 2, "head_size": 4, "mlp": 8}
    fields = {"vocab_size": 32, "max_length": 16, "width": 8, "encoder": stack, "decoder": stack}
    config = native.model_config("t5", fields | {"scalar_heads": ("reward",)}, dtype="float32", where="")
    with pytest.raises(UserError, match="transformers has no T5 with a head of one number"):
        FAMILIES["t5"].table(config)
