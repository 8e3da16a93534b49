"""Claims about decoding with a cache, on a tiny model with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.pretrain import test as test_config
from t5x_like.core import dtypes, tree
from t5x_like.core.errors import UserError
from t5x_like.inference import decode
from t5x_like.inference.sampling import GREEDY, Sampling
from t5x_like.inference.weights import serving_params
from t5x_like.layers.scoring.head import logits
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.parallel import rules as tables

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def model():
    section = test_config.get_config().model
    section.decoder.windows = (6, 0)  # a ring of 6 slots, and a layer that sees all
    section.init.std = 0.3  # sharp logits, so that greedy choices are not ties
    policy = dtypes.policy(params="float32", compute="auto", platform="cpu")
    return Model(model_config.resolve(section), tables.rules(), policy)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def next_logits(model, params):
    """Logits after a prefix, by the whole forward pass without a cache."""

    @jax.jit
    def function(params, tokens_1T, last):
        return logits(*model.score_input(params, model.apply(params, {"inputs": tokens_1T})))[0, last]

    def call(prefix):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(prefix)] = prefix
        return function(params, jnp.asarray(padded), len(prefix) - 1)

    return call


@pytest.fixture(scope="module")
def greedy(model, params):
    return decode.generate(model, params, PROMPTS, max_new_tokens=12, sampling=GREEDY, seed=0)


def test_greedy_decoding_with_a_cache_follows_the_whole_forward_pass(greedy, next_logits):
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        prefix = list(prompt)
        assert len(new) == 12
        for token in new:
            assert int(jnp.argmax(next_logits(prefix))) == token
            prefix.append(token)


def test_generation_stops_after_the_stop_token_and_leaves_it_out(model, params, greedy):
    stop = greedy[0][4]
    new = decode.generate(model, params, PROMPTS, max_new_tokens=12, sampling=GREEDY, seed=0, stop_ids=[stop])
    for row, full in zip(new, greedy, strict=True):
        assert row == (full[: full.index(stop)] if stop in full else full)


def test_generation_stops_at_the_first_of_several_tokens(model, params, greedy):
    stops = [greedy[0][6], greedy[1][3]]
    new = decode.generate(model, params, PROMPTS, max_new_tokens=12, sampling=GREEDY, seed=0, stop_ids=stops)
    ends = [min([full.index(stop) for stop in stops if stop in full], default=12) for full in greedy]
    assert new == [full[:end] for full, end in zip(greedy, ends, strict=True)] and min(ends) < 12


def test_a_prompt_draws_the_same_tokens_whatever_stands_after_it(model, params):
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.95)

    def draw(prompts, seed):
        return decode.generate(model, params, prompts, max_new_tokens=8, sampling=sampling, seed=seed)

    assert draw(PROMPTS[:1], 3)[0] == draw(PROMPTS, 3)[0]
    assert draw(PROMPTS, 3) != draw(PROMPTS, 4)


def test_a_prompt_is_padded_to_no_more_than_the_model_takes(model, params):
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=100))
    assert [decode.row_length(short, length) for length in (1, 64, 65, 100, 101)] == [64, 64, 100, 100, 101]

    def generate(length):
        return decode.generate(short, params, [[5] * length], max_new_tokens=2, sampling=GREEDY, seed=0)

    assert len(generate(65)[0]) == 2
    with pytest.raises(UserError, match="a row of 101 tokens is longer than config.model.max_length=100"):
        generate(101)


def test_padding_of_the_vocabulary_is_never_drawn(model, params):
    sampling = Sampling(temperature=100.0, top_k=0, top_p=1.0)
    new = decode.generate(model, params, [[1]] * 8, max_new_tokens=40, sampling=sampling, seed=0)
    assert model.config.padded_vocab > model.config.vocab_size
    assert max(max(row) for row in new) < model.config.vocab_size


def test_serving_weights_are_read_in_the_compute_type_and_compute_the_same(model, params):
    half = dataclasses.replace(model, dtypes=dataclasses.replace(model.dtypes, compute="bfloat16"))
    serving = serving_params(half, params)
    types = {path: leaf.dtype.name for path, leaf in tree.leaves(serving)}
    assert {types[path] for path in ("embed/tokens", "layers/attention/o", "layers/mlp/down")} == {"bfloat16"}
    assert {types[path] for path in types if "norm" in path} == {"float32"}
    batch = {"inputs": jnp.asarray([PROMPTS[2]])}
    run = jax.jit(lambda params: logits(*half.score_input(params, half.apply(params, batch))))
    np.testing.assert_array_equal(run(serving), run(params))
