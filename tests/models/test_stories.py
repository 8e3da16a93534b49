"""A trained model, not a random one: stories260K continues BOS exactly as llama2.c publishes it, through the cache."""

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.layers.scoring.token_scores import token_scores
from tests.models import stories


def test_greedy_decoding_with_the_cache_gives_the_published_story():
    model, params, expected = stories.model(), stories.params(), stories.expected_ids()
    steps = len(expected) - 1
    assert len(set(expected)) > 50, "a story, not a loop"

    def step(params, carry, position):
        cache, ids = carry
        batch = {"inputs": ids, "positions": jnp.full_like(ids, position)}
        out = model.apply(params, batch, cache=cache)
        best = token_scores(*model.score_input(params, out), want=("best",)).best
        return (out.cache, best), best[0, 0]

    @jax.jit
    def decode(params):
        start = (model.init_cache(1, steps), jnp.full((1, 1), expected[0], jnp.int32))
        return jax.lax.scan(lambda carry, position: step(params, carry, position), start, jnp.arange(steps))[1]

    np.testing.assert_array_equal(decode(jax.tree.map(jnp.asarray, params)), expected[1:])


def test_parameters_are_counted_without_padding():
    assert stories.model().parameter_count() == 260_032
