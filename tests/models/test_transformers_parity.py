"""Each family computes what transformers computes: logits, loss and every gradient, from the same weights.

Packed rows, caches and shardings are compared with our own forward pass elsewhere (test_model.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.scoring.head import logits
from tests.models import cases

mapping = pytest.importorskip("tests.models.transformers_mapping", reason="needs torch and transformers")


@pytest.fixture(scope="module", params=cases.PUBLISHED)
def both(request):
    """(config, ours, theirs), each (loss, logits, gradients)."""
    model = cases.model(request.param)
    params = cases.random_params(model)
    batch, targets = cases.batch(model, 2, 40, source=30, seed=1), cases.tokens(model, 2, 40, seed=2)

    def loss(params):
        values = logits(*model.score_input(params, model.apply(params, batch)))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(values), targets[..., None], axis=-1)
        return -chosen.mean(), values

    (value, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = mapping.loss_and_gradients(mapping.build(model.config, params), batch, np.asarray(targets))
    return model.config, (value, ours, gradients), theirs


def test_logits_equal(both):
    config, (_, ours, _), (_, theirs, _) = both
    assert np.asarray(ours)[..., config.vocab_size :].max() == -np.inf  # the padding of the vocabulary
    assert cases.largest_difference(np.asarray(ours)[..., : config.vocab_size], theirs) <= 1e-5


def test_loss_equals_to_a_millionth(both):
    _, (ours, _, _), (theirs, _, _) = both
    assert abs(float(ours) - theirs) <= 1e-6 * abs(theirs)


def test_every_gradient_equals(both):
    config, (_, _, ours), (_, _, theirs) = both
    ours = mapping.state(config, ours)
    assert set(ours) == set(theirs)
    differences = {name: cases.largest_difference(ours[name], theirs[name]) for name in theirs}
    assert max(differences.values()) <= 1e-5, sorted(differences.items(), key=lambda item: -item[1])[:5]
