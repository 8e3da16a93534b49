"""An answer has the same tokens in instruction tuning, in preferences, and behind the prompt of a served model."""

import json
import pathlib

import numpy as np
import pytest

from t5x_like.core import formats
from t5x_like.data import cache
from t5x_like.data.templates import named
from t5x_like.data.templates.chat import Chat
from t5x_like.data.tokenizers import behind, vocabularies
from t5x_like.data.write import prepare
from tests.data import chats, corpus

STORIES = pathlib.Path(__file__).parents[1] / "stories260K"
PROMPT, GOOD, WORSE = "Tom had a red ball. He", " played with it", "llo! was it"
FIELDS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "byte-level")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = chats.folder(tmp_path_factory.mktemp("tokenizer"))
    return {name: str(STORIES / name) for name in TOKENIZERS[:2]} | {"byte-level": str(folder)}


def opened(place, tokenizer, record, **given):
    (place / "a.jsonl").write_text(json.dumps(record) + "\n")
    shape = {"packing": "single", "length": 96, "batch_size": 1, "tokenizer": tokenizer}
    return corpus.opened(corpus.config(source=f"jsonl:{place}/a.jsonl", **shape | given), place / "cache")


def read(data, prefix=""):
    """(tokens of the text, of these with loss)."""
    batch = data.rows(0, np.arange(1))
    count = int(batch[f"{prefix}segment_ids"][0].sum())
    whole = batch[f"{prefix}inputs"][0][:count].tolist()
    if f"{prefix}targets" not in batch:
        return whole, []
    weights = batch[f"{prefix}loss_weights"][0][:count] > 0
    return whole, [token for token, weight in zip(whole[1:], weights[:-1], strict=True) if weight]


@pytest.mark.parametrize("template", ["none", "plain"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_all_forms_of_a_text_have_equal_tokens(tokenizers, tmp_path, name, template):
    given = {"chat": {"template": template}}
    pair = {"prompt": PROMPT, "chosen": GOOD, "rejected": WORSE}
    kinds = {
        features: opened(tmp_path, tokenizers[name], pair, features=features, fields=FIELDS, **given)
        for features in ("pairs", "pair_texts")
    }
    vocabulary = kinds["pairs"].vocabulary
    for side, answer in (("chosen", GOOD), ("rejected", WORSE)):
        record = {"q": PROMPT, "a": answer}
        example = opened(
            tmp_path, tokenizers[name], record, fields={"inputs": "q", "targets": "a"}, packing="examples", **given
        )
        whole, trained = read(example)
        if template != "none":  # behind an answer the template writes an end of line, which no pair has
            whole = whole[: len(whole) - whole[::-1].index(vocabulary.eos_id)]
        assert read(kinds["pairs"], f"{side}/") == (whole, trained)
        assert read(kinds["pair_texts"], f"{side}/")[0] == whole
        served = vocabulary.encode(PROMPT, bos=True)
        if template != "none":
            chat = Chat(named.TEMPLATES[template], vocabulary, where="")
            served = vocabulary.encode_parts(chat.prompt([{"role": "user", "content": PROMPT}]).parts())[0].tolist()
        assert whole == [*served, *trained]
        # The answer has no space that nobody wrote, and adding it would have been seen.
        text = vocabulary.decode(whole).strip()
        assert text.endswith(answer.strip()) and (template == "none") <= (text == PROMPT + answer)
        if name != "byte-level" and answer == WORSE:
            assert trained[:-1] != vocabulary.encode(answer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_answer_whose_begin_joins_the_prompt_keeps_the_tokens_of_the_prompt(tokenizers, name):
    vocabulary = vocabularies.load(tokenizers[name])
    prompts, answers = ["The ", "Once upon a t", "", "a\n", "q"], ["cat", "ime", "x", "\u732b", ""]
    found = behind.encode(vocabulary, prompts, answers)
    for prompt, answer, (ids, counts) in zip(prompts, answers, found, strict=True):
        assert counts.sum() == len(answer.encode()) and len(ids) == len(counts)
        assert vocabulary.decode([*vocabulary.encode(prompt), *ids]) == prompt + answer


def test_only_what_changed_has_new_names(tokenizers, tmp_path):
    """Caches and runs of earlier formats keep the tokens that they have."""
    record = {"q": PROMPT, "a": GOOD}
    fields = {"inputs": "q", "targets": "a"}
    for name, same in (("tokenizer.model", False), ("byte-level", True)):
        old, new = (
            opened(tmp_path, tokenizers[name], record, fields=fields, packing="examples", answers=answers)
            for answers in ("apart", "joined")
        )
        assert (old.fingerprint == new.fingerprint) == same, name
    text = corpus.config(source="text:a")
    assert cache.key(text) == cache.key(corpus.config(source="text:a", answers="apart")) == "cc25f23182968d0c"
    stored = formats.upgrade({"format": 4, "data": {"fields": {}}}, where="a")
    assert stored["data"]["answers"] == "apart"
    encoder = corpus.config(source="jsonl:a", fields=fields, features="source_target", encoder_length=8)
    assert not encoder.joined and corpus.config(source="jsonl:a", fields=fields).joined


def test_a_cache_of_before_is_enough_where_its_tokens_are_the_same(tokenizers, tmp_path):
    fields, record = {"inputs": "q", "targets": "a"}, {"q": PROMPT, "a": GOOD}
    for name, enough in (("byte-level", True), ("tokenizer.json", False)):
        place = tmp_path / name
        place.mkdir()
        opened(place, tokenizers[name], record, fields=fields, packing="examples", answers="apart")
        (place / "a.jsonl").unlink()
        given = {"packing": "examples", "length": 96, "batch_size": 1, "tokenizer": tokenizers[name]}
        config = corpus.config(source=f"jsonl:{place}/a.jsonl", fields=fields, **given)
        assert (cache.find_manifest(config, str(place / "cache")) is not None) == enough
        if enough:
            prepare.prepare(config, str(place / "cache"), report=None)
