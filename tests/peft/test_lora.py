"""The leaf W + A s B by its definition in float64, and an adapter on whole models: what it changes, and what not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.layers import weights
from t5x_like.layers.scoring.head import logits
from t5x_like.peft import attach
from t5x_like.peft.config import AdapterConfig, LoraConfig
from t5x_like.peft.lora import LoraArray
from tests.models import cases

LORA = {"rank": 3, "alpha": 6.0, "rank_stabilized": False, "dropout": 0.0, "targets": (".*",), "ranks": ()}


def config(**fields) -> AdapterConfig:
    built = AdapterConfig("lora", LoraConfig(**LORA | fields))
    assert built.lora is not None
    built.lora.check("config.adapter.lora")
    return built


def adapted(model, *, zero: bool = False, **fields):
    """(the adapter, parameters of the model with random ones of the adapter beside them)."""
    adapter = attach.build(config(**fields), model.specs())
    assert adapter is not None
    draw = np.random.default_rng(7)

    def part(path, spec):
        noise = draw.standard_normal(spec.shape).astype(np.float32)
        return jnp.asarray(noise * 0.0 if zero and path.endswith("/b") else 0.3 * noise)

    return adapter, cases.random_params(model) | tree.map_with_path(part, adapter.specs())


def run(model, params, batch, key=None):
    def function(params, batch):
        hidden_BTD, head = model.score_input(params, model.apply(params, batch, key=key))
        return logits(hidden_BTD, head)[:, :, : head.vocab_size]

    return np.asarray(jax.jit(function)(params, batch))


def arrays(*shapes):
    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape).astype(np.float32) for shape in shapes]


def leaf(base, a, b, scale, axes, **fields) -> LoraArray:
    parts = (jnp.asarray(part, jnp.float32) for part in (base, a, b, scale))
    names = ("base", "a", "b", "scale_R")
    given = {"key": None, "dropout": 0.0} | fields
    return LoraArray(**dict(zip(names, parts, strict=True)), axes=axes, **given)


def test_products_are_those_of_the_definition():
    x, w, a, b = arrays((2, 5, 4, 3), (4, 3, 7), (4, 3, 2), (2, 7))
    scale = np.array([0.5, 2.0])
    lora = leaf(w, a, b, scale, ("heads", "head", "embed"))
    whole = w.astype(np.float64) + np.einsum("nhr,r,rd->nhd", a.astype(np.float64), scale, b)
    expected = np.einsum("btnh,nhd->btd", x.astype(np.float64), whole)
    assert np.abs(expected - np.einsum("btnh,nhd->btd", x, w)).max() > 0.1, "the addition is no zero"
    np.testing.assert_allclose(weights.einsum("BTNH,NHD->BTD", jnp.asarray(x), lora), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lora.dense(jnp.float32), whole, rtol=1e-6, atol=1e-6)


def test_a_small_addition_is_not_rounded_away_in_bfloat16():
    x = jnp.tile(jnp.asarray([[1.0, -1.0]], jnp.bfloat16), (8, 1))
    lora = leaf(np.ones((2, 1)), np.array([[2.0**-10], [0.0]]), np.ones((1, 1)), np.ones(1), ("embed", "mlp"))
    assert jnp.asarray(lora.dense("bfloat16"))[0, 0] == 1, "W + A s B in this type is W"
    assert (weights.einsum("BD,DF->BF", x, lora) == 2.0**-10).all()


def test_rows_and_groups_are_those_of_the_whole_weight():
    table, a, b = arrays((11, 6), (11, 2), (2, 6))
    lora = leaf(table, a, b, np.array([2.0, 1.0]), ("vocab", "embed"))
    ids = jnp.asarray([[0, 10, 3]])
    np.testing.assert_allclose(
        weights.take(lora, ids, dtype="float32"), lora.dense(jnp.float32)[ids], rtol=1e-5, atol=1e-6
    )
    x, experts, a, b = arrays((5, 4), (2, 4, 6), (2, 4, 3), (2, 3, 6))
    lora = leaf(experts, a, b, np.array([1.0, 0.5, 2.0]), ("experts", "embed", "mlp"))
    sizes = jnp.asarray([2, 3], jnp.int32)
    dense = weights.ragged(jnp.asarray(x), lora.dense(jnp.float32), sizes)
    np.testing.assert_allclose(weights.ragged(jnp.asarray(x), lora, sizes), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama_grouped_tied", "gpt2", "t5"])
def test_an_adapter_that_was_just_made_changes_no_logit(case):
    model = cases.model(case)
    adapter, whole = adapted(model, zero=True)
    batch = cases.batch(model, 2, 9)
    plain = {name: part for name, part in whole.items() if name != attach.ROOT}
    np.testing.assert_array_equal(run(model, adapter.attach(whole), batch), run(model, plain, batch))
    assert len(adapter.targets) == {"llama_grouped_tied": 7, "gpt2": 6, "t5": 16}[case]


@pytest.mark.parametrize("case", ["llama", "local_and_global", "gpt2", "t5_gated"])
def test_an_adapter_computes_what_its_weights_written_out_compute(case):
    """Scanned, in segments and one by one: no layer knows of it."""
    model = cases.model(case)
    adapter, whole = adapted(model)
    batch = cases.batch(model, 2, 9)
    params = adapter.attach(whole)
    written = tree.map_with_path(lambda _, leaf: weights.dense(leaf, jnp.float32), params)
    dense, low = run(model, written, batch), run(model, params, batch)
    plain = run(model, {name: part for name, part in whole.items() if name != attach.ROOT}, batch)
    assert cases.largest_difference(dense, plain) > 0.01
    assert cases.largest_difference(low, dense) < 1e-5
    single = cases.model(case, scan=False)
    assert cases.largest_difference(run(single, params, batch), dense) < 1e-5


@pytest.mark.parametrize("case", ["llama", "llama_grouped_tied", "gpt2", "t5_gated"])
def test_an_embedding_and_a_head_are_adapted_where_they_are_named(case):
    """ ".*" are the matrices of layers, as it was. Logits and the gradients of the adapter are those of the weights
    written out, of a table that is both (tied) too."""
    model = cases.model(case)
    specs = tree.flatten(model.specs())
    ends = [path for path in ("embed/tokens", "head/weight") if path in specs]
    assert len(ends) == (1 if model.config.head.tied else 2)
    adapter, whole = adapted(model, targets=(".*", *ends))
    plain, _ = adapted(model)
    assert adapter.targets.keys() - plain.targets.keys() == {*ends}
    named = attach.build(config(targets=(".*/attention/q", "(embed/tokens|head/weight)")), model.specs())
    assert named is not None and {*ends} < named.targets.keys()
    batch = cases.batch(model, 2, 9)

    def loss(parts, write):
        params = adapter.attach({**whole, attach.ROOT: parts})
        if write:
            params = tree.map_with_path(lambda _, leaf: weights.dense(leaf, jnp.float32), params)
        found = model.score_input(params, model.apply(params, batch))
        return jnp.sum(jnp.square(logits(*found)[:, :, : model.config.vocab_size])), logits(*found)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, low), low_gradients = step(whole[attach.ROOT], False)
    (_, dense), dense_gradients = step(whole[attach.ROOT], True)
    low, dense = (np.asarray(array)[:, :, : model.config.vocab_size] for array in (low, dense))
    only = run(model, plain.attach(whole | {attach.ROOT: tree.unflatten(_of(whole, plain))}), batch)
    assert cases.largest_difference(dense, only) > 0.01, "the ends change something"
    assert cases.largest_difference(low, dense) < 1e-5
    for path, gradient in tree.leaves(dense_gradients):
        mine = np.asarray(tree.flatten(low_gradients)[path])
        assert np.abs(gradient).max() > 0, path
        assert np.abs(mine - np.asarray(gradient)).max() <= 1e-5 * np.abs(gradient).max(), path


def _of(whole, adapter):
    """The parts of an adapter with fewer targets."""
    parts = tree.flatten(whole[attach.ROOT])
    return {path: part for path, part in parts.items() if path.rpartition("/")[0] in adapter.targets}


def test_an_adapter_of_the_ends_begins_without_effect_and_can_learn():
    model = cases.model("llama")
    adapter = attach.build(config(targets=("embed/tokens", "head/weight")), model.specs())
    assert adapter is not None
    found = {path: spec for path, spec in tree.leaves(adapter.specs()[attach.ROOT])}
    vocab, width = model.specs()["embed"]["tokens"].shape
    assert found["embed/tokens/a"].shape == found["head/weight/a"].shape == (vocab, 3)
    assert {found[f"{path}/a"].init for path in adapter.targets} == {"zeros"}
    assert found["embed/tokens/b"].init == "normal(1)" and found["head/weight/b"].init.startswith("uniform(")
    assert found["head/weight/b"].shape == (3, width) and found["head/weight/b"].axes == ("rank", "embed")


def test_layers_have_ranks_of_their_own():
    """A column that a layer has not gives nothing, whatever stands there, and learns nothing."""
    model = cases.model("llama")
    fields = {"ranks": (("layers/mlp/.*", (1, 0)), ("layers/attention/q", 2)), "rank_stabilized": True}
    adapter, whole = adapted(model, **fields)
    ranks = {path: target.ranks for path, target in adapter.targets.items()}
    assert ranks["layers/mlp/up"] == (1, 0) and ranks["layers/attention/q"] == (2, 2)
    assert ranks["layers/attention/o"] == (3, 3)
    assert adapter.targets["layers/mlp/up"].scales == (6.0, 0.0)
    assert adapter.targets["layers/attention/q"].scales == (6.0 / 2**0.5,) * 2
    batch = cases.batch(model, 2, 9)

    def loss(part):
        params = adapter.attach({**whole, attach.ROOT: part})
        return jnp.sum(jnp.square(model.apply(params, batch).hidden_BTD))

    gradients = tree.flatten(jax.jit(jax.grad(loss))(whole[attach.ROOT]))
    for name in ("a", "b"):
        gradient = np.asarray(gradients[f"layers/mlp/up/{name}"])
        assert np.abs(gradient[0]).max() > 0 and np.abs(gradient[1]).max() == 0, name


def test_dropout_needs_a_key_and_keeps_the_mean():
    """Another mask for each weight, layer and key; without a key there is none."""
    model = cases.model("llama")
    adapter, whole = adapted(model, dropout=0.5)
    params, batch = adapter.attach(whole), cases.batch(model, 2, 9)
    one, two = (run(model, params, batch, key=jax.random.key(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(one, run(model, params, batch, key=jax.random.key(1)))
    assert cases.largest_difference(one, two) > 1e-3
    none = attach.build(config(), model.specs())
    assert none is not None
    np.testing.assert_array_equal(run(model, params, batch), run(model, none.attach(whole), batch))

    x, w, a, b = arrays((4000, 6), (6, 3), (6, 2), (2, 3))
    lora = leaf(w, a, b, np.ones(2), ("embed", "mlp"), dropout=0.25)
    keyed = weights.keyed({"one": lora, "other": lora}, jax.random.key(0))
    ones = jnp.ones_like(jnp.asarray(x))
    first, second = (np.asarray(weights.einsum("BD,DF->BF", ones, keyed[name])) for name in ("one", "other"))
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(first.mean(0), weights.einsum("BD,DF->BF", ones, lora)[0], atol=0.1)
    stacked = leaf(w[None].repeat(2, 0), a[None].repeat(2, 0), b[None].repeat(2, 0), np.ones((2, 2)), (), dropout=0.25)
    keys = np.asarray(stacked.with_key(jax.random.key(0)).key)
    assert keys.shape[0] == 2 and (keys[0] != keys[1]).any()


BAD = {
    "a target that matches nothing": ({"targets": ("layers/attention/quer",)}, "did you mean 'layers/attention/q"),
    "a target that is no matrix": ({"targets": ("final_norm/scale",)}, "'final_norm/scale' matches no matrix of the"),
    "a target that is no regex": ({"targets": ("(",)}, "'(' is no regular expression"),
    "no target": ({"targets": ()}, "targets is empty"),
    "no rank": ({"rank": 0}, "rank=0 should be at least 1"),
    "a rank that no weight has": ({"rank": 40}, "rank=40 is more than 'layers/attention/"),
    "a rank of nothing": ({"ranks": (("layers/mlp/.*", 0),)}, "'layers/mlp/.*' gets 0, which should be at least 1"),
    "ranks of other layers": ({"ranks": (("layers/mlp/.*", (1, 2, 3)),)}, "has 2 layers, and gets (1, 2, 3)"),
    "ranks of what is no target": (
        {"targets": (".*/mlp/.*",), "ranks": (("layers/attention/q", 2),)},
        "ranks: 'layers/attention/q' matches no matrix",
    ),
    "no scale": ({"alpha": 0.0}, "alpha=0 should be above 0"),
    "all dropped": ({"dropout": 1.0}, "dropout=1 should be in [0, 1)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_fits_no_model_is_one_line(case):
    fields, part = BAD[case]
    with pytest.raises(UsageError) as error:
        attach.build(config(**fields), cases.model("llama").specs())
    assert part in str(error.value) and "\n" not in str(error.value)
