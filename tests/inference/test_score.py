"""Claims about scores of many texts, on a tiny model: what they are, in which company, on which mesh, at what cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.inference import score as scoring
from t5x_like.inference.score import Likelihood, rolling_windows, row_length, score, score_rolling
from t5x_like.layers.scoring.head import logits
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.parallel.sharding import tree_shardings
from tests.models import cases

LIMIT = 200
MESHES = {"fsdp=8": (8, 1), "fsdp=2 tensor=2": (2, 2)}


@functools.cache
def world():
    """(model, parameters) of a model that takes 200 tokens: rows of 64, 128, 192 and 200."""
    model = cases.model("llama", max_length=LIMIT)
    return model, cases.random_params(model)


@functools.cache
def rows(count=40):
    """Texts of 2 to 201 tokens, some with nothing to score."""
    model, random = world()[0], np.random.default_rng(0)
    lengths = [2, 65, 66, LIMIT, LIMIT + 1, *random.integers(2, LIMIT + 2, count - 5)]
    texts = [random.integers(0, model.config.vocab_size, length).tolist() for length in lengths]
    return [(ids, int(random.integers(1, len(ids) + 1))) for ids in texts]


@jax.jit
def whole_log_probs(params, ids_1T):
    model = world()[0]
    values = logits(*model.score_input(params, model.apply(params, {"inputs": ids_1T})))
    return jax.nn.log_softmax(values, axis=-1)[0]


def plain(ids, first):
    """One text on its own, padded to one length, from whole logits."""
    padded = np.zeros((1, LIMIT), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    logp_TV = np.asarray(whole_log_probs(world()[1], jnp.asarray(padded)))
    picked = [float(logp_TV[i - 1, ids[i]]) for i in range(first, len(ids))]
    greedy = all(int(logp_TV[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))
    return sum(picked), greedy, len(picked)


@functools.cache
def alone(name=None):
    return [run([row], name)[0] for row in rows()]


def run(some, name=None):
    model, params = world()
    if name is None:
        return score(model, params, some, tokens_per_batch=512)
    mesh, placed = on_mesh(name)
    return score(model, placed, some, mesh=mesh, tokens_per_batch=512)


@functools.cache
def on_mesh(name):
    model, params = world()
    fsdp, tensor = MESHES[name]
    mesh = meshes.make(
        MeshConfig("fsdp_tensor", "", None, None, None, fsdp, None, None, tensor), jax.devices()[: fsdp * tensor]
    )
    return mesh, jax.device_put(params, tree_shardings(mesh, model.rules, model.specs()))


def test_scores_are_sums_over_the_whole_forward_pass_in_input_order():
    found = run(rows())
    assert [likelihood.tokens for likelihood in found] == [len(ids) - first for ids, first in rows()]
    for likelihood, (ids, first) in zip(found, rows(), strict=True):
        total, greedy, _ = plain(ids, first)
        assert likelihood.logp == pytest.approx(total, rel=1e-5, abs=1e-5) and likelihood.greedy == greedy
    assert len({likelihood.logp for likelihood in found}) > 30


def test_greedy_says_whether_every_scored_token_is_the_best():
    ids = [5, 6, 7]
    for _ in range(3):
        padded = np.zeros((1, LIMIT), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(whole_log_probs(world()[1], jnp.asarray(padded))[len(ids) - 1].argmax()))
    wrong = [*ids[:-1], (ids[-1] + 1) % 61]
    assert [likelihood.greedy for likelihood in run([(ids, 3), (wrong, 3)])] == [True, False]


@pytest.mark.parametrize("name", [None, *MESHES])
def test_a_text_has_the_same_bits_in_any_company(name):
    order = np.random.default_rng(1).permutation(len(rows()))
    together = run([rows()[index] for index in order], name)
    assert [alone(name)[index] for index in order] == together
    assert len({likelihood.logp for likelihood in together}) > 30


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_what_one_device_gives(name):
    for found, expected in zip(run(rows(), name), run(rows()), strict=True):
        assert found.logp == pytest.approx(expected.logp, rel=1e-5, abs=1e-5)
        assert (found.greedy, found.tokens) == (expected.greedy, expected.tokens)


def test_texts_of_many_sizes_share_few_programs():
    model, params = world()
    before = scoring._scores._cache_size()
    for count in range(1, 11):
        score(model, params, [([1] * (19 * count + 2), 1)] * count, tokens_per_batch=256)
    assert scoring._scores._cache_size() - before == 3  # rows of 64, 128 and 192 tokens
    assert sorted({row_length(length, LIMIT) for length in range(1, LIMIT + 1)}) == [64, 128, 192, 200]


def test_rows_fit_flash_kernels_where_there_are_any(monkeypatch):
    assert row_length(130, 2000) == 192
    monkeypatch.setattr(scoring, "platform", lambda: "tpu")
    assert [row_length(length, 2000) for length in (1, 130, 300, 1025, 1600)] == [128, 256, 384, 1536, 2000]


def test_a_text_that_is_too_long_is_refused_or_cut_at_its_beginning():
    model, params = world()
    ids = rows()[4][0]
    assert len(ids) == LIMIT + 1
    longer = [3, 1, 4, *ids]
    with pytest.raises(UsageError, match="row 1 has 204 tokens, more than max_length . 1 = 201"):
        score(model, params, [(ids, 190), (longer, 193)])
    assert score(model, params, [(longer, 193)], truncate="left") == score(model, params, [(ids, 190)])
    with pytest.raises(UsageError, match="202 tokens to score, more than max_length=200 .* rolling windows"):
        score(model, params, [(longer, 2)], truncate="left")
    with pytest.raises(UsageError, match="truncate='right' should be one of error, left"):
        score(model, params, [], truncate="right")
    with pytest.raises(UsageError, match="row 0: first=0 should be from 1 to its 3 tokens"):
        score(model, params, [([1, 2, 3], 0)])
    assert score(model, params, [([], 0), ([1, 2], 2)]) == [Likelihood(0.0, True, 0)] * 2


@pytest.mark.parametrize("context", [1, 50])
def test_rolling_windows_score_each_token_once_with_what_fits_before_it(context):
    ids = np.random.default_rng(2).integers(0, 61, 500).tolist()
    total, position, feed = 0.0, 1, LIMIT
    while position < len(ids):  # the plain loop
        new = feed if position == 1 else feed - context + 1
        end = min(position + new, len(ids))
        start = max(0, end - 1 - feed)
        total += plain(ids[start:end], position - start)[0]
        position = end
    (found,) = score_rolling(*world(), [ids], context=context)
    assert found.logp == pytest.approx(total, rel=1e-6) and found.tokens == 499
    short = ids[:50]
    assert score_rolling(*world(), [short, ids, [1]])[0] == score(*world(), [(short, 1)])[0]
    assert score_rolling(*world(), [[1]]) == [Likelihood(0.0, True, 0)]


def test_windows_of_a_text_that_fits_are_one():
    assert rolling_windows(list(range(5)), max_length=4) == [(list(range(5)), 1)]
    with pytest.raises(UsageError, match="context=9 should be from 1 to max_length=8"):
        rolling_windows([1, 2], max_length=8, context=9)
