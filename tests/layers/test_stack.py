"""The runner of layers, with a toy block whose result tells which layer ran when, with what kind and which slice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from t5x_like.layers import stack

KINDS = {
    "all_equal": "aaaa",
    "period_of_two_and_rest": "ababa",
    "period_of_three": "aabaab",
    "no_repetition": "abc",
    "one": "a",
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scan", [True, False])
def test_each_layer_runs_once_in_order_with_its_kind_and_its_weights(kinds, scan):
    count, p = len(kinds), stack.period(kinds)
    weights = {"w": jnp.arange(1.0, count + 1)}
    caches = [{"c": 10.0 * jnp.arange(len(range(place, count, p))) + place} for place in range(p)]

    def block(w, x, *, place, index, cache):
        x = 2.0 * x + w["w"] * (ord(kinds[place]) - ord("a") + 1)  # depends on the order
        return x, {"index": jnp.asarray(index), "cache": cache["c"], "place": jnp.asarray(place)}

    run = jax.jit(lambda w, c: stack.run(block, w, jnp.ones(()), kinds=kinds, caches=c, scan=scan, remat="none"))
    x, outputs = run(weights, caches)
    expected = 1.0
    for i, kind in enumerate(kinds):
        expected = 2.0 * expected + (i + 1) * (ord(kind) - ord("a") + 1)
    assert float(x) == expected
    np.testing.assert_array_equal(outputs["index"], np.arange(count))
    np.testing.assert_array_equal(outputs["place"], np.arange(count) % p)
    np.testing.assert_array_equal(outputs["cache"], 10.0 * (np.arange(count) // p) + np.arange(count) % p)


def test_gradient_of_unrolled_layers_is_one_concatenation_and_no_sum_of_padded_arrays():
    def block(w, x, *, place, index, cache):
        return jnp.tanh(x * w["w"]), None

    def loss(w):
        return stack.run(block, w, jnp.ones(3), kinds="aaaa", caches=None, scan=False, remat="none")[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))({"w": jnp.ones((4, 3))}))
    assert "concatenate" in text and "pad" not in text


def test_remat_policies_save_less_in_the_order_of_their_table():
    def block(w, x, *, place, index, cache):
        y, z = jnp.dot(jnp.sin(x), w["w"]), jnp.dot(jnp.exp(x), w["w"])
        q = checkpoint_name(jnp.dot(jnp.cos(x), w["w"]), "q")
        return jnp.dot(jnp.sin(checkpoint_name(jnp.tanh(q) * jnp.sin(y) * z, "context")), w["w"]), None

    def saved(remat):
        def loss(w):
            out = stack.run(block, w, jnp.ones((3, 3)), kinds="aa", caches=None, scan=False, remat=remat)[0]
            return jnp.square(out).sum()

        back = jax.eval_shape(lambda w: jax.vjp(loss, w)[1], {"w": jnp.ones((2, 3, 3))})
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    sizes = [saved(remat) for remat in ("none", "dots", "minimal", "context", "full")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
