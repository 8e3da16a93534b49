"""A norm in the weights of its products, as TPUs run it, against the norm as it is written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers import normed
from tests.models import cases


@pytest.mark.parametrize("remat", ["none", "products"])
@pytest.mark.parametrize("case", ["llama_grouped_tied", "local_and_global"])
def test_loss_and_gradients_are_those_of_the_norm_as_written(case, remat, monkeypatch):
    """Of a model whose norms all come before products, and of one where queries and keys have norms of their own."""
    model = cases.model(case, tied=True)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=remat))
    params = cases.random_params(model)
    batch = {"inputs": cases.tokens(model, 2, 16)}
    weights = np.random.default_rng(1).standard_normal((2, 16, model.config.width)).astype(np.float32)
    called = []

    def run(params):
        return jnp.mean(jnp.square(model.apply(params, batch).hidden_BTD - weights))

    expected, as_written = jax.jit(jax.value_and_grad(run))(params)
    plain = normed.Normed.times
    monkeypatch.setattr(normed, "platform", lambda: "tpu")
    monkeypatch.setattr(normed.Normed, "times", lambda *a, **k: called.append(a[3]) or plain(*a, **k))
    found, divided = jax.jit(jax.value_and_grad(lambda params: run(params)))(params)
    assert set(called) == {"mlp_up", "mlp_gate"}
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(divided), jax.tree.leaves(as_written), strict=True):
        assert np.abs(other).max() > 0
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
