"""The runner of layers, with toy blocks whose results tell which layer ran when, with what kind and which weights."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from t5x_like.layers import remat as remats
from t5x_like.layers import stack
from tests.models import cases

KINDS = {
    "all_equal": "aaaa",
    "period_of_two_and_rest": "ababa",
    "period_of_three": "aabaab",
    "no_repetition": "abc",
    "one": "a",
    "unlike_first": "AAbbbb",
    "unlike_within_a_period": "aBaBBaBaBB",
    "periods_side_by_side": "aaaabcbcbcd",
}


@dataclasses.dataclass(frozen=True)
class Kind:
    name: str

    @property
    def group(self) -> str:
        return "large" if self.name.isupper() else "small"


def kinds_of(names):
    return [Kind(name) for name in names]


def toy(w, x, rows, *, kind, index, cache):
    x = 2.0 * x + w["w"] * (ord(kind.name) - ord("A") + 1) + rows  # depends on the order
    sums = {"index": jnp.asarray(index), kind.group: w["w"]}
    return x, {"cache": None if cache is None else cache[index], "sums": sums}


@pytest.mark.parametrize("names", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_each_layer_runs_once_in_order_with_its_kind_and_its_weights(names, scan, cached):
    kinds, count = kinds_of(names), len(names)
    numbers = {group: [i for i, kind in enumerate(kinds) if kind.group == group] for group in ("small", "large")}
    weights = {group: {"w": jnp.asarray(found, jnp.float32)} for group, found in numbers.items() if found}
    cache = 10.0 * jnp.arange(count) if cached else None
    run = functools.partial(stack.run, {"small": toy, "large": toy}, kinds=kinds, scan=scan, remat="none")
    x, outputs = jax.jit(lambda w, x, rows, cache: run(w, x, rows, cache=cache))(weights, 1.0, 0.5, cache)
    expected = 1.0
    for i, name in enumerate(names):
        expected = 2.0 * expected + i * (ord(name) - ord("A") + 1) + 0.5
    assert float(x) == expected
    np.testing.assert_array_equal(outputs["sums"]["index"], np.arange(count))
    for group, found in numbers.items():  # a sum that only some layers give
        np.testing.assert_array_equal(outputs["sums"].get(group, np.zeros(0)), found)
    if cached:
        np.testing.assert_array_equal(outputs["cache"], cache)


def test_a_stack_is_cut_where_its_pattern_begins_and_ends():
    def cut(names):
        return [(names[s.start : s.start + s.period], s.repeats) for s in stack.segments(names)]

    assert cut("dddeeeeeeee") == [("d", 3), ("e", 8)]
    assert cut("llllllgllllllgll") == [("llllllg", 2), ("l", 2)]
    assert cut("aabcbcbcx") == [("a", 2), ("bc", 3), ("x", 1)]
    assert cut("abc") == [("abc", 1)]


def test_gradients_of_a_stack_of_groups_do_not_depend_on_how_it_runs():
    kinds = kinds_of("BBcdcdce")
    weights = {"large": {"w": jnp.asarray([0.7, 0.9])}, "small": {"w": jnp.linspace(0.5, 1.5, 6)}}

    def block(w, x, rows, *, kind, index, cache):
        return jnp.tanh(x * w["w"] + 0.05 * rows * (ord(kind.name) - ord("A"))), {"cache": None, "sums": {}}

    def loss(weights, rows, **how):
        run = functools.partial(stack.run, {"large": block, "small": block}, kinds=kinds)
        return jnp.sum(run(weights, jnp.ones(3), rows, **how)[0])

    rows = jnp.linspace(0.1, 0.2, 3)
    grads = [
        jax.jit(jax.grad(functools.partial(loss, scan=scan, remat=remat), argnums=(0, 1)))(weights, rows)
        for scan, remat in ((True, "none"), (False, "none"), (True, "full"))
    ]
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads[0]))
    for other in grads[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), grads[0], other)


def test_gradient_of_unrolled_layers_is_one_concatenation_and_no_sum_of_padded_arrays():
    def block(w, x, rows, *, kind, index, cache):
        return jnp.tanh(x * w["w"]), {"cache": None, "sums": {}}

    def loss(w):
        run = functools.partial(stack.run, {"small": block}, kinds=kinds_of("aaaa"), scan=False, remat="none")
        return run({"small": w}, jnp.ones(3), None)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))({"w": jnp.ones((4, 3))}))
    assert "concatenate" in text and "pad" not in text


def test_every_name_that_remat_saves_is_given_by_a_block():
    """A name that no block gives would silently be computed again."""
    model = cases.model("llama")  # gated, so that it has them all
    batch = {"inputs": jnp.zeros((1, 4), jnp.int32)}
    jaxpr = jax.make_jaxpr(lambda params: model.apply(params, batch).hidden_BTD)(cases.random_params(model))
    given = set(re.findall(r"name\[name=(\w+)\]", str(jaxpr)))
    assert given == {*remats.POINTS, stack._LAYER_INPUT}
    assert {name for names in remats.SAVED.values() for name in names} <= given


def test_remat_policies_save_less_in_the_order_of_their_table():
    def block(w, x, rows, *, kind, index, cache):
        y, z = jnp.dot(jnp.sin(x), w["w"]), jnp.dot(jnp.exp(x), w["w"])
        q = checkpoint_name(jnp.dot(jnp.cos(x), w["w"]), "q")
        x = jnp.dot(jnp.sin(checkpoint_name(jnp.tanh(q) * jnp.sin(y) * z, "context")), w["w"])
        return x, {"cache": None, "sums": {}}

    def saved(remat):
        def loss(w):
            run = functools.partial(stack.run, {"small": block}, kinds=kinds_of("aa"), scan=False, remat=remat)
            return jnp.square(run({"small": w}, jnp.ones((3, 3)), None)[0]).sum()

        back = jax.eval_shape(lambda w: jax.vjp(loss, w)[1], {"w": jnp.ones((2, 3, 3))})
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    sizes = [saved(remat) for remat in ("none", "dots", "minimal", "context", "full", "context:0.5", "q+context")]
    *policies, half, points = sizes
    assert policies == sorted(policies, reverse=True)
    assert len(set(policies)) == len(policies)
    *_, minimal, context, full = policies
    assert (half - full) * 2 == context - full
    assert points == minimal  # what a toy gives no name is no point
