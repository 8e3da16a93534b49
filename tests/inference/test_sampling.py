"""Claims about drawing one token from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.inference.sampling import Sampling, filter_logits, sample

LOGITS_BV = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]))


def _kept(**changes):
    sampling = Sampling(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes))
    return np.isfinite(filter_logits(LOGITS_BV, sampling)).astype(int).tolist()


def test_top_k_keeps_the_k_most_probable():
    assert _kept() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert _kept(top_k=2) == [[1, 1, 0, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("top_p,first", [(0.4, [1, 0, 0, 0]), (0.79, [1, 1, 0, 0]), (0.81, [1, 1, 1, 0])])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, first):
    assert _kept(top_p=top_p) == [first, first[::-1]]


def test_top_p_is_applied_to_what_temperature_and_top_k_leave():
    # Of the two that top-k keeps, the first has probability 0.625 and alone reaches 0.6.
    assert _kept(top_k=2, top_p=0.6) == [[1, 0, 0, 0], [0, 0, 0, 1]]
    # A high temperature flattens: more tokens are needed for the same p.
    assert sum(_kept(temperature=10.0, top_p=0.5)[0]) > sum(_kept(top_p=0.4)[0])


def test_frequencies_follow_the_tempered_softmax():
    keys = jax.random.split(jax.random.key(0), 20_000)
    sampling = Sampling(temperature=2.0, top_k=0, top_p=1.0)
    drawn = sample(jnp.tile(LOGITS_BV[:1], (len(keys), 1)), keys, sampling)
    frequency = np.bincount(drawn, minlength=4) / len(keys)
    np.testing.assert_allclose(frequency, jax.nn.softmax(LOGITS_BV[0] / 2), atol=0.015)


def test_a_row_draws_the_same_whatever_stands_beside_it():
    keys = jax.random.split(jax.random.key(1), 2)
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.9)
    both = sample(LOGITS_BV, keys, sampling)
    assert both[1] == sample(LOGITS_BV[1:], keys[1:], sampling)[0]


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused_with_their_name(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        Sampling(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0} | change))


def test_a_tiny_temperature_is_greedy_and_no_overflow():
    logits = jnp.array([[1.0, 5.0, 4.0]])
    filtered = filter_logits(logits, Sampling(1e-37, 0, 0.9))
    assert filtered.tolist() == [[-jnp.inf, 0.0, -jnp.inf]]
