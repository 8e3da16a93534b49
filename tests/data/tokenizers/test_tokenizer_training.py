"""Tokenizers that are trained here are the same in every process, lossless, and of the size that was asked for."""

import subprocess
import sys

import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.tokenizers import tokenizer_training
from t5x_like.data.write import encoding
from t5x_like.data.write.preprocessors import Document
from tests.data import corpus

_PROGRAM = """
import sys
from t5x_like.data.tokenizers import tokenizer_training
from tests.data import corpus
print(tokenizer_training.train(sys.argv[1], int(sys.argv[2]), corpus.paragraphs(40)).fingerprint)
"""


@pytest.mark.parametrize(("kind", "size"), [("bpe", 400), ("unigram", 270), ("sentencepiece", 360)])
def test_training_gives_the_same_tokenizer_in_another_process(kind, size):
    here = tokenizer_training.train(kind, size, corpus.paragraphs(40))
    command = [sys.executable, "-c", _PROGRAM, kind, str(size)]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert here.fingerprint == there and here.size == size
    assert here.fingerprint != tokenizer_training.train(kind, size, corpus.paragraphs(39)).fingerprint


def test_a_text_too_short_for_the_size_is_said():
    with pytest.raises(UserError, match="gave 2"):
        tokenizer_training.train("bpe", 5000, ["a short text"])


@pytest.mark.parametrize("text", ["train:bep:1024", "train:bpe", "train:bpe:100", "train:bpe:many", "train:"])
def test_a_wrong_recipe_is_refused_with_its_place(text):
    with pytest.raises(UsageError, match="config.data.tokenizer=train:"):
        tokenizer_training.parse(text, where="config.data.tokenizer")
    assert tokenizer_training.parse("tokenizer/path", where="") is None


@pytest.mark.parametrize(
    ("texts", "limit", "expected"),
    [
        (["\u540d\u524d", "later"], 5, ["\u540d"]),  # 3 bytes each: the second is not whole
        (["\u540d\u524d", "later"], 6, ["\u540d\u524d"]),
        (["ab", "\U0001f600c", "later"], 5, ["ab"]),
        (["ab", "\U0001f600c", "later"], 6, ["ab", "\U0001f600"]),
        (["", "\u00e9", "later"], 7, ["\u00e9", "later"]),
        (["abc", "def", "later"], 4, ["abc", "d"]),
        (["abc", "def", "later"], 3, ["abc"]),
    ],
)
def test_text_to_train_on_is_counted_in_bytes_and_cut_between_characters(texts, limit, expected):
    documents = [(0, number, Document("", text)) for number, text in enumerate(texts)]
    assert list(encoding.first_texts(documents, limit)) == expected
