"""Claims about a loaded model at the limit of its length, on the trained stories260K cut to 64 tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data.tokenizers import vocabularies
from t5x_like.inference import score as scoring
from t5x_like.language_model import LanguageModel
from tests.models import cases, stories

LIMIT = 64


@functools.cache
def stories_model():
    model = stories.model()
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=LIMIT))
    params = jax.tree.map(jnp.asarray, stories.params())
    return LanguageModel(short, params, vocabularies.load(str(stories.DIRECTORY)))


def story(tokens):
    """The published story as text, cut where it has this many tokens with its BOS."""
    lm = stories_model()
    text = lm.vocabulary.decode(stories.expected_ids()[:tokens])
    assert len(lm.vocabulary.encode(text, bos=True)) == tokens
    return text


def split(text):
    """(context, continuation): the last word."""
    cut = text.rindex(" ")
    return text[:cut], text[cut:]


def test_a_text_one_longer_than_the_model_is_scored_since_its_last_token_is_not_fed():
    lm = stories_model()
    before = scoring._scores._cache_size()
    ((logp, greedy),) = lm.log_likelihood(*zip(split(story(LIMIT + 1)), strict=True))
    assert greedy and -5 < logp < 0
    with pytest.raises(UsageError, match="66 tokens, more than max_length . 1 = 65 .* truncate='left'"):
        lm.log_likelihood(*zip(split(story(LIMIT + 2)), strict=True))
    ((cut, _),) = lm.log_likelihood(*zip(split(story(LIMIT + 2)), strict=True), truncate="left")
    assert -20 < cut < 0
    lm.log_likelihood(["Once"] * 40, [" upon a time"] * 40)
    assert scoring._scores._cache_size() == before + 1  # one program for 1 and for 40 texts


def test_without_a_context_all_but_what_begins_a_document_is_scored():
    lm = stories_model()
    assert lm.log_likelihood([""], [""]) == [(0.0, True)]
    ((whole, _),), ((rest, _),) = lm.log_likelihood([""], ["Once upon"]), lm.log_likelihood(["Once"], [" upon"])
    assert whole < rest < 0


def test_generation_stays_within_the_model_unless_told():
    lm = stories_model()
    prompt = story(60)
    assert story(64).startswith(prompt + lm.generate(prompt, max_new_tokens=4, temperature=0)[0])
    lm.generate(prompt, max_new_tokens=5, temperature=0)  # the fifth is not fed
    with pytest.raises(UsageError, match="max_length=64; ask for at most 5 new ones, .* with beyond_max_length"):
        lm.generate(prompt, max_new_tokens=6, temperature=0)
    beyond = lm.generate(prompt, max_new_tokens=20, temperature=0, beyond_max_length=True)[0]
    assert story(80).startswith(prompt + beyond)
    with pytest.raises(UsageError, match="a prompt of 65 tokens is longer than this model's max_length=64; shorten it"):
        lm.generate(story(65), max_new_tokens=1, beyond_max_length=True)


def test_learned_positions_never_go_on():
    lm = dataclasses.replace(stories_model(), model=cases.model("gpt2"), params={})
    with pytest.raises(UsageError, match="max_length=64; ask for at most 5 new ones, shorten the prompt$"):
        lm.generate(story(60), max_new_tokens=6, beyond_max_length=True)
