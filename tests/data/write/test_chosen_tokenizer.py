"""The tokenizer of a config: trained once, on text that is not held out, and on no more of it than is allowed."""

import dataclasses

import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data import cache
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.write import chosen_tokenizer, prepare
from tests.data import corpus


@pytest.fixture
def source(tmp_path):
    """A jsonl source of 60 kB."""
    return corpus.write_jsonl(tmp_path / "source.jsonl", corpus.paragraphs(400))


def test_a_tokenizer_is_trained_without_held_out_text(tmp_path):
    (tmp_path / "a.txt").write_text("plain words only " * 100 + "\nzyzzyva zyzzyva zyzzyva" * 150)
    learned = {}
    for validation in ("", "0.7"):
        config = corpus.config(source=f"text:{tmp_path}/a.txt", tokenizer="train:bpe:265", validation=validation)
        prepare.prepare(config, str(tmp_path / "cache"), report=None)
        vocabulary = vocabularies.load(
            str(tmp_path / "cache" / cache.read_manifest(config, str(tmp_path / "cache")).tokenizer)
        )
        learned[validation] = vocabulary.encode("zyzzyva")
    assert len(learned["0.7"]) == 7 > len(learned[""])


def test_training_text_of_a_tokenizer_is_limited(source, tmp_path):
    config = corpus.config(source=source, tokenizer="train:bpe:300", tokenizer_training_bytes=3000)
    full = dataclasses.replace(config, tokenizer_training_bytes=100_000)
    made = [prepare.prepare(c, str(tmp_path), report=None).manifest.tokenizer for c in (config, full, config)]
    assert made[0] == made[2] != made[1]


def test_training_text_is_said_to_be_no_more_than_there_is_and_is_allowed(source, tmp_path):
    (tmp_path / "a.txt").write_text("only few words")
    sources = {"few": f"text:{tmp_path}/a.txt", "many": source}
    seen = []
    config = corpus.config(mixture={"sources": sources}, tokenizer="train:bpe:300", tokenizer_training_bytes=8000)
    prepare.prepare(config, str(tmp_path / "cache"), report=seen.append)
    assert [state for state in seen if isinstance(state, prepare.Training)] == [
        chosen_tokenizer.Training(300, 14 + 4000)
    ]


def test_sentinels_are_added_to_a_trained_tokenizer_that_is_trained_once(tmp_path, monkeypatch):
    source = corpus.write_jsonl(tmp_path / "text.jsonl", corpus.paragraphs(30))
    plain = corpus.opened(corpus.config(source=source, tokenizer="train:bpe:300"), tmp_path / "cache").vocabulary
    monkeypatch.setattr("t5x_like.data.tokenizers.tokenizer_training.train", None)
    chosen = corpus.config(source=source, tokenizer="train:bpe:300", extra_ids=7)
    more = corpus.opened(chosen, tmp_path / "cache").vocabulary
    assert (plain.size, more.size, more.extra_ids) == (300, 307, 7)
    with pytest.raises(UsageError, match=r"extra_ids=-1 should be at least 0"):
        prepare.prepare(corpus.config(source=source, extra_ids=-1), str(tmp_path / "cache"), report=None)
