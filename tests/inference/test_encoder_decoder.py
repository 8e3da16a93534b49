"""Claims about answers and scores of encoder-decoders, on tiny random T5s, beside transformers and a plain forward."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data.tokenizers import sentinels, vocabularies
from t5x_like.inference import decode
from t5x_like.inference import score as scoring
from t5x_like.inference.sampling import GREEDY
from t5x_like.language_model import LanguageModel
from t5x_like.layers.scoring.head import logits
from t5x_like.runs.loading import start_id
from tests.models import cases

SOURCES = [[11, 12, 13, 14, 15, 16, 1], [21, 22, 1]]
LIMIT = 128


@functools.cache
def world(case="t5"):
    model = cases.model(case, max_length=LIMIT)
    return model, varied(cases.random_params(model))


def varied(params):
    """Weights with which greedy answers do not repeat one token: less of the source, more of what stands where."""
    decoder = params["decoder"]
    layers = decoder["layers"]
    layers = {**layers, "cross": {**layers["cross"], "o": 0.1 * layers["cross"]["o"]}}
    bias = {"table": 3.0 * decoder["relative_bias"]["table"]}
    embed = {"tokens": 0.1 * params["embed"]["tokens"]}
    return {**params, "embed": embed, "decoder": {**decoder, "layers": layers, "relative_bias": bias}}


def generate(sources, case="t5", prompt=(0,), count=64, stop_ids=()):
    prompts = [list(prompt)] * len(sources)
    return decode.generate(
        *world(case), prompts, sources=sources, max_new_tokens=count, sampling=GREEDY, seed=0, stop_ids=stop_ids
    )


@pytest.mark.parametrize("case", ["t5", pytest.param("t5_gated", marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_transformers(case):
    """Two sources of different length in one padded batch, 64 tokens, none of which ends a row."""
    mapping = pytest.importorskip("tests.models.transformers_mapping", reason="needs torch and transformers")
    import torch

    model, params = world(case)
    theirs = mapping.build(model.config, params)
    theirs.generation_config.eos_token_id = None
    width = max(map(len, SOURCES))
    ids = torch.tensor([source + [0] * (width - len(source)) for source in SOURCES])
    mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in SOURCES])
    expected = theirs.generate(
        ids, attention_mask=mask, decoder_start_token_id=0, max_new_tokens=64, do_sample=False, num_beams=1
    )
    ours = generate(SOURCES, case)
    assert ours == expected[:, 1:].tolist()
    assert ours[0] != ours[1] and len(set(ours[0])) > 5


def test_a_source_is_answered_the_same_in_any_company_up_to_the_stop_token():
    together = generate(SOURCES)
    assert [generate([source])[0] for source in SOURCES] == together
    stop = together[0][9]
    for row, full in zip(generate(SOURCES, stop_ids=[stop]), together, strict=True):
        assert row == (full[: full.index(stop)] if stop in full else full)


def test_an_answer_goes_on_from_its_prefix():
    whole = generate(SOURCES[:1], count=20)[0]
    assert generate(SOURCES[:1], prompt=(0, *whole[:7]), count=13)[0] == whole[7:]


def test_sources_are_for_models_with_an_encoder():
    llama = cases.model("llama")
    for model, sources in ((world()[0], None), (llama, [[1]])):
        with pytest.raises(ValueError, match="sources for a model with an encoder"):
            decode.generate(model, {}, [[0]], sources=sources, max_new_tokens=1, sampling=GREEDY, seed=0)
    with pytest.raises(UsageError, match="targets after sources"):
        scoring.score(*world(), [([0, 1], 1)])


# Scores.


@jax.jit
def whole_log_probs(params, source_1S, ids_1T):
    """Of one pair without any padding but that of the target's end."""
    model = world()[0]
    output = model.apply(params, {"inputs": ids_1T, "encoder_inputs": source_1S})
    return jax.nn.log_softmax(logits(*model.score_input(params, output)), axis=-1)[0]


@functools.cache
def pairs():
    random = np.random.default_rng(0)
    lengths = [(5, 6), (65, 3), (5, 80), (LIMIT, LIMIT + 1), *random.integers(2, 40, (12, 2)).tolist()]
    ids = [[random.integers(0, 61, length).tolist() for length in both] for both in lengths]
    return [source for source, _ in ids], [([0, *target[1:]], 1) for _, target in ids]


def score(sources, rows, **options):
    return scoring.score(*world(), rows, sources=sources, tokens_per_batch=512, **options)


def test_scores_are_those_of_a_plain_forward():
    sources, rows = pairs()
    found = score(sources, rows)
    for index in (0, 1, 2, 3):
        (ids, _), likelihood = rows[index], found[index]
        logp_TV = np.asarray(whole_log_probs(world()[1], jnp.asarray([sources[index]]), jnp.asarray([ids[:-1]])))
        assert likelihood.logp == pytest.approx(sum(logp_TV[i, t] for i, t in enumerate(ids[1:])), rel=1e-5)
        assert likelihood.tokens == len(ids) - 1
    target = [0, *generate(sources[:1], count=5)[0]]
    other = score(sources[:2], [(target, 1), (target, 1)])
    assert other[0].greedy and other[0].logp != other[1].logp


def test_a_pair_has_the_same_bits_in_any_company():
    sources, rows = pairs()
    before = scoring._scores._cache_size()
    alone = [score([source], [row])[0] for source, row in zip(sources, rows, strict=True)]
    order = np.random.default_rng(1).permutation(len(rows))
    together = score([sources[i] for i in order], [rows[i] for i in order])
    assert together == [alone[i] for i in order] and len({found.logp for found in alone}) > 10
    assert scoring._scores._cache_size() - before <= 4  # one program for each pair of lengths of rows


def test_a_long_source_is_refused_or_cut_at_its_beginning():
    source, target = [7] * 3 + [5] * LIMIT, ([0, 8, 9], 1)
    with pytest.raises(UsageError, match="the source of row 0 has 131 tokens, more than max_length=128"):
        score([source], [target])
    assert score([source], [target], truncate="left") == score([source[3:]], [target])
    with pytest.raises(UsageError, match="130 tokens to score, more than max_length=128"):
        score([source], [([0] * 131, 1)], truncate="left")


# Text.


@functools.cache
def language_model():
    """A T5 whose tokens are bytes and 20 sentinels."""
    vocabulary = vocabularies.load("bytes").with_extra_ids(20)
    model = cases.model("t5", max_length=LIMIT, vocab_size=vocabulary.size)
    return LanguageModel(model, varied(cases.random_params(model)), vocabulary)


def test_text_is_generated_scored_and_goes_on_from_a_prefix():
    lm = language_model()
    one, two = lm.generate(["To be", "or not to be"], max_new_tokens=12, temperature=0)
    assert one != two
    source = lm.vocabulary.encode("To be", eos=True)
    (new,) = decode.generate(
        lm.model,
        lm.params,
        [[0]],
        sources=[source],
        max_new_tokens=12,
        sampling=GREEDY,
        seed=0,
        stop_ids=[lm.vocabulary.eos_id],
    )
    assert one == sentinels.decode(lm.vocabulary, new)
    ((logp, greedy),) = lm.log_likelihood(["To be"], ["abc"])
    expected = scoring.score(lm.model, lm.params, [([0, *lm.vocabulary.encode("abc")], 1)], sources=[source])
    assert (logp, greedy) == (expected[0].logp, expected[0].greedy)
    forced = lm.generate("To be", max_new_tokens=3, temperature=0, prefix="ab")[0]
    values = lm.logits([[0, *lm.vocabulary.encode("ab")]], [source])[0, -1]
    assert values.shape == (lm.vocabulary.size,)
    assert forced.startswith(sentinels.decode(lm.vocabulary, [int(values.argmax())]))


def test_sentinels_are_one_token_in_a_prompt_and_are_shown_in_an_answer():
    vocabulary = language_model().vocabulary
    ids = sentinels.encode(vocabulary, "To be <extra_id_0> to <extra_id_19><extra_id_20>")
    last = vocabulary.size - 1
    assert ids == [
        *vocabulary.encode("To be"),
        last,
        *vocabulary.encode(" to"),
        last - 19,
        *vocabulary.encode("<extra_id_20>"),
    ]
    assert sentinels.decode(vocabulary, ids) == "To be<extra_id_0> to<extra_id_19><extra_id_20>"
    assert sentinels.encode(vocabulary, "") == []


def test_what_does_not_fit_a_model_is_one_line():
    lm = language_model()
    with pytest.raises(UsageError, match="a prompt of 131 tokens is longer than this model's max_length=128"):
        lm.generate("a" * 130, max_new_tokens=1)
    with pytest.raises(UsageError, match="max_length=128; ask for at most 128 new ones"):
        lm.generate("a", max_new_tokens=129)
    with pytest.raises(UsageError, match="logits: a model with an encoder reads sources"):
        lm.logits([[0]])
    llama = dataclasses.replace(lm, model=cases.model("llama"))
    with pytest.raises(UsageError, match="prefix is for a model with an encoder"):
        llama.generate("a", max_new_tokens=1, prefix="b")


def test_the_start_token_is_that_of_the_data_or_of_the_folder_a_model_came_from():
    model, vocabulary = language_model().model, language_model().vocabulary
    assert start_id(model, {"config": {"data": {"start_token": "eos"}}}, vocabulary) == vocabulary.eos_id
    assert start_id(model, {"generation_config": {"decoder_start_token_id": 5}, "token_ids": {}}, vocabulary) == 5
    assert start_id(model, {"generation_config": {}, "token_ids": {"decoder_start_token_id": 6}}, vocabulary) == 6
    assert start_id(model, {"config": {"model": {}}}, vocabulary) == 0
    assert start_id(types.SimpleNamespace(config=cases.config("llama")), {}, vocabulary) == 0
