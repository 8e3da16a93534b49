"""The fast way gives the ids of the library, character for character, or does not take the text."""

import json
import random

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from t5x_like.data.tokenizers import word_cache
from tests.data import corpus

PATTERNS = {"gpt2": word_cache.GPT2, "llama3": word_cache.LLAMA3, "qwen2": word_cache.QWEN2}
# Each class and its edges: apostrophes and what follows them, the long s that folds to s, digits that are no decimals,
# marks, white space that is one for Unicode or for Python only, and characters that are left to the library.
AWKWARD = (
    "aZ\u017f'stveld\u2019 \u00e9e\u0301\u00b2\u00bd\u0664\u2160 \t\n\r\x0b\x1c\x1f\x85\xa0\u2007\u2028\u3000._-("
    "\u4e2d\U0001f600\u0378"
)


@pytest.fixture(scope="module", params=PATTERNS)
def tokenizer(request):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pattern = PATTERNS[request.param]
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = whole if request.param == "gpt2" else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    generator = random.Random(0)
    texts = corpus.paragraphs(60) + ["".join(generator.choices(AWKWARD, k=200)) for _ in range(40)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    assert word_cache.pattern_of(json.loads(tokenizer.to_str())) == pattern
    return tokenizer, pattern


class One:
    """A cache that is asked for one text at a time."""

    def __init__(self, tokenizer, pattern):
        self.cache = word_cache.WordCache(pattern, lambda words: [e.ids for e in tokenizer.encode_batch_fast(words)])

    def encode(self, text):
        return self.cache.encode([text])[0]


def fast(tokenizer, pattern):
    return One(tokenizer, pattern)


def test_ids_are_those_of_the_library(tokenizer):
    cache = fast(*tokenizer)
    taken = []

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
    @hypothesis.given(
        st.one_of(st.text(AWKWARD, max_size=40), st.text(st.characters(max_codepoint=0x3010), max_size=20))
    )
    def check(text):
        ids = cache.encode(text)
        taken.append(ids is not None and len(text) > 3)
        assert ids is None or ids == tokenizer[0].encode(text).ids

    check()
    assert sum(taken) > 50


def test_every_character_alone_and_between_letters_is_classed_alike(tokenizer):
    cache, (library, _) = fast(*tokenizer), tokenizer
    for first in range(0, 0x3000, 64):
        characters = [chr(point) for point in range(first, first + 64)]
        for text in ("".join(f"a{c}b 1{c}2 .{c} {c}\n" for c in characters if cache.encode(c) is not None),):
            assert cache.encode(text) == library.encode(text).ids


def test_characters_of_uncertain_class_are_left_to_the_library(tokenizer):
    cache = fast(*tokenizer)
    assert cache.encode("a\u4e2d") is cache.encode("\U0001f600") is cache.encode("\u0378") is None
    assert cache.encode("a\u00e9 \u0430\u2019s") is not None


def test_texts_are_encoded_together_as_alone(tokenizer):
    texts = [*corpus.paragraphs(20), "", "\u4e2d", "a"]
    alone = fast(*tokenizer)
    assert fast(*tokenizer).cache.encode(texts) == [alone.encode(text) for text in texts]
    assert alone.encode("\u4e2d") is None and alone.encode("") == []


def test_a_full_memory_is_emptied(tokenizer, monkeypatch):
    monkeypatch.setattr(word_cache, "_MOST_CHARACTERS", 50)
    cache = fast(*tokenizer)
    for text in corpus.paragraphs(20):
        ids = cache.encode(text)
        assert ids is None or ids == tokenizer[0].encode(text).ids
    assert cache.cache._characters <= 50


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"added_tokens": [{"id": 0, "content": "  ", "special": False}]},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model": {"type": "BPE", "dropout": 0.1}},
    ],
)
def test_other_tokenizers_go_the_slow_way(change):
    layout = {
        "normalizer": None,
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "dropout": None},
    }
    assert word_cache.pattern_of(layout) == word_cache.GPT2
    assert word_cache.pattern_of(layout | change) is None
