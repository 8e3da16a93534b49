"""A loss whose gradient is formed in the forward pass, against the same loss of scores that are differentiated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.scoring import token_loss as module
from t5x_like.layers.scoring.head import Head
from t5x_like.layers.scoring.token_loss import token_loss
from t5x_like.layers.scoring.token_scores import token_scores
from tests.layers.scoring.world import FAST, MESHES, REAL, TABLE, B, D, T, V, make_mesh

WANT = ("logp", "logz", "mean", "best")


def of_tokens(scores, weights):
    """Cross entropy, z-loss and label smoothing."""
    nll = -jnp.sum(weights * scores.logp)
    z_loss = 0.1 * jnp.sum(weights * jnp.square(scores.logz))
    return nll + z_loss + 0.3 * jnp.sum(weights * (scores.logz - scores.mean)), {"nll": nll, "z_loss": z_loss}


def arrays(rows=B):
    random = np.random.default_rng(0)
    x_BTD = random.standard_normal((rows, T, D), np.float32)
    weight_VD = 0.5 * random.standard_normal((V, D), np.float32)
    bias_V = random.standard_normal(V, np.float32)
    targets_BT = random.integers(0, REAL, (rows, T), np.int32)
    weights_BT = random.integers(0, 3, (rows, T)).astype(np.float32)
    return x_BTD, weight_VD, bias_V, targets_BT, weights_BT, np.float32(weights_BT.sum())


def formed(x_BTD, head, targets_BT, weights_BT, total, chunk):
    return token_loss(of_tokens, x_BTD, head, targets_BT, weights_BT, total, want=WANT, chunk=chunk)


def differentiated(x_BTD, head, targets_BT, weights_BT, total, chunk):
    loss, sums = of_tokens(token_scores(x_BTD, head, targets_BT, want=WANT, chunk=chunk), weights_BT)
    return loss / total, sums


def run(loss, softcap, chunk, x_BTD, weight_VD, bias_V, *others):
    def value(x_BTD, weight_VD, bias_V):
        head = Head(weight=weight_VD, bias=bias_V, vocab_size=REAL, softcap=softcap, rules=TABLE, scale=0.7)
        value, sums = loss(x_BTD, head, *others, chunk)
        return 2.0 * value, sums  # a factor that the forward pass does not know

    return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(x_BTD, weight_VD, bias_V)


@functools.cache
def expected(softcap, rows=B):
    return jax.jit(functools.partial(run, differentiated, softcap, 0), compiler_options=FAST)(*arrays(rows))


def assert_same(results, references):
    np.testing.assert_allclose(results[0][0], references[0][0], rtol=1e-6)
    for name, value in references[0][1].items():
        np.testing.assert_allclose(results[0][1][name], value, rtol=1e-6)
    for result, reference in zip(jax.tree.leaves(results[1]), jax.tree.leaves(references[1]), strict=True):
        assert np.abs(reference).max() > 0.01
        assert np.abs(result - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("chunk", [0, 7, 1000], ids="chunk{}".format)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_sums_and_gradients_are_those_of_scores(softcap, chunk):
    results = jax.jit(functools.partial(run, formed, softcap, chunk), compiler_options=FAST)(*arrays())
    assert_same(results, expected(softcap))
    assert np.all(np.asarray(results[1][1])[REAL:] == 0)  # padding of the vocabulary learns nothing


@pytest.mark.parametrize("scattered", ["whole", "in_parts"])
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_what_one_device_gives(name, scattered, monkeypatch):
    """Of few tokens a device the gradient of the logits is kept, of many that of the head is summed up."""
    if scattered == "in_parts":
        monkeypatch.setattr(module, "SCATTER_BYTES", 4 * D * 100)
    with jax.set_mesh(make_mesh(MESHES[name])):
        results = jax.jit(functools.partial(run, formed, 3.0, 4), compiler_options=FAST)(*arrays())
    assert_same(results, expected(3.0))


def test_the_head_is_multiplied_three_times_instead_of_four():
    def products(loss):
        jaxpr = jax.make_jaxpr(functools.partial(run, loss, 3.0, 12))(*arrays())
        return str(jaxpr).count("dot_general")

    assert (products(formed), products(differentiated)) == (3, 4)


def test_a_loss_that_is_not_differentiated_forms_no_gradient():
    def value(*inputs):
        x, weight, bias, *others = inputs
        head = Head(weight=weight, bias=bias, vocab_size=REAL, softcap=None, rules=TABLE, scale=0.7)
        return formed(x, head, *others, 12)

    loss, sums = jax.jit(value)(*arrays())
    np.testing.assert_allclose(2 * loss, expected(None)[0][0], rtol=1e-6)
    assert str(jax.make_jaxpr(value)(*arrays())).count("dot_general") == 1
