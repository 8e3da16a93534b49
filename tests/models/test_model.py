"""What a model promises whatever its family: causality, packing, caching, scanning, remat, dropout, and its own tree.

Agreement with independent code is in test_transformers_parity.py, shardings are in test_sharding.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from tests.models import cases

FAST = {"xla_backend_optimization_level": 0}  # compiles faster; the comparisons are between programs of one level


@functools.cache
def built(case):
    model = cases.model(case)
    return model, cases.random_params(model)


def source(model, rows):
    """What `apply` reads besides the tokens of the decoder: tokens of an encoder that the decoder has not."""
    return {"encoder_inputs": jnp.tile(jnp.arange(50, 56, dtype=jnp.int32), (rows, 1))} if model.config.encoder else {}


def hidden(model, params, batch, **rest):
    function = jax.jit(lambda params, batch: model.apply(params, batch, **rest).hidden_BTD, compiler_options=FAST)
    return function(params, batch)


def loss_and_gradients(model, params, batch):
    """A loss to which every hidden number matters in its own way, and that does not cancel."""
    shape = (*batch["inputs"].shape, model.config.width)
    goal = jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)
    function = jax.value_and_grad(lambda params: jnp.square(model.apply(params, batch).hidden_BTD - goal).mean())
    return jax.jit(function, compiler_options=FAST).lower(params).compile()


def assert_equal_trees(ours, theirs, tolerance=1e-5):
    differences = {
        path: cases.largest_difference(a, b)
        for (path, a), (_, b) in zip(tree.leaves(ours), tree.leaves(theirs), strict=True)
        if np.any(b)
    }
    assert max(differences.values()) <= tolerance, sorted(differences.items(), key=lambda item: -item[1])[:5]


def influence(model, params, length):
    """[t, s]: how strongly the hidden state at t depends on the token at s, by the gradient of its embedding row."""
    ids = jnp.arange(length, dtype=jnp.int32)[None, :]  # all different, so that each row of the table is one position

    def run(table):
        embed = {**params["embed"], "tokens": table}
        return model.apply({**params, "embed": embed}, {"inputs": ids, **source(model, 1)}).hidden_BTD[0]

    def of_all(table):
        out, back = jax.vjp(run, table)
        weights = jnp.linspace(1.0, 2.0, out.shape[-1])  # a norm makes the plain sum of its outputs blind
        return jax.vmap(lambda row: back(row[:, None] * weights[None, :])[0])(jnp.eye(length))

    gradients = jax.jit(of_all, compiler_options=FAST)(params["embed"]["tokens"])
    return np.abs(np.asarray(gradients)).max(axis=-1)[:, :length]


@pytest.mark.parametrize("case", ["llama_grouped_tied", "gpt2", "local_and_global", "t5"])
def test_future_tokens_do_not_change_hidden_states_and_past_tokens_do(case):
    model, params = built(case)
    strength = influence(model, params, 12)
    past = np.tril(np.ones_like(strength, bool))
    assert (strength[~past] == 0.0).all()
    assert (strength[past] > 1e-6).all()


def test_window_limits_how_far_each_layer_sees():
    model = cases.model("llama", windows=(3,), layers=2)
    strength = influence(model, cases.random_params(model), 12)
    distance = np.arange(12)[:, None] - np.arange(12)[None, :]
    seen = (distance >= 0) & (distance <= 2 * (3 - 1))  # each layer reaches two tokens further back
    assert (strength[~seen] == 0.0).all()
    assert (strength[seen] > 1e-7).all()


@pytest.mark.parametrize("case", ["llama_grouped_tied", "local_and_global", "t5"])
def test_scan_and_unrolled_layers_give_the_same_loss_and_gradients(case):
    model, params = built(case)
    batch = cases.batch(model, 2, 12)
    unrolled = dataclasses.replace(model, config=dataclasses.replace(model.config, scan=False))
    programs = [loss_and_gradients(m, params, batch) for m in (model, unrolled)]
    assert [" while(" in program.as_text() for program in programs] == [True, False]
    (value, gradients), (other, others) = (program(params) for program in programs)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    assert_equal_trees(gradients, others)


@pytest.fixture(scope="module")
def without_remat():
    model = cases.model("llama_grouped_tied", layers=4)
    params = cases.random_params(model)
    batch = {"inputs": cases.tokens(model, 4, 32)}
    return model, params, batch, loss_and_gradients(model, params, batch)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["dots", "minimal", "context", "full"])
def test_remat_changes_memory_and_nothing_else(without_remat, remat, scan):
    model, params, batch, plain = without_remat
    config = dataclasses.replace(model.config, remat=remat, scan=scan)
    program = loss_and_gradients(dataclasses.replace(model, config=config), params, batch)
    value, gradients = plain(params)
    other, others = program(params)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    assert_equal_trees(gradients, others)
    if scan:
        sizes = [p.memory_analysis().temp_size_in_bytes for p in (program, plain)]
        assert sizes[0] < sizes[1], "nothing was computed again"


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_remat_changes_no_gradient_of_an_encoder_decoder(remat):
    model, params = built("t5_gated")
    batch = cases.batch(model, 2, 12)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=remat))
    (value, gradients), (again, others) = (loss_and_gradients(m, params, batch)(params) for m in (model, other))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    assert_equal_trees(gradients, others)


@pytest.mark.parametrize("case", ["t5", "t5_gated"])
def test_packed_sources_and_targets_give_what_each_pair_gives_alone(case):
    """Three pairs in one row of the encoder and one of the decoder, whose shares of the row differ; both padded."""
    model, params = built(case)
    sources, targets = (4, 7, 3), (5, 2, 6)
    batch = cases.batch(model, 1, 15, source=16)
    for name, lengths, padding in (("encoder_", sources, 2), ("", targets, 2)):
        segments = np.repeat([1, 2, 3, 0], [*lengths, padding])[None, :]
        positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])[None, :]
        batch[f"{name}segment_ids"], batch[f"{name}positions"] = jnp.asarray(segments), jnp.asarray(positions)
    packed = hidden(model, params, batch)
    mixed = hidden(model, params, {name: batch[name] for name in ("inputs", "encoder_inputs")})
    starts = [np.cumsum([0, *lengths]) for lengths in (sources, targets)]
    for number in range(3):
        source_part, part = (slice(start[number], start[number + 1]) for start in starts)
        one = {"inputs": batch["inputs"][:, part], "encoder_inputs": batch["encoder_inputs"][:, source_part]}
        alone = hidden(model, params, one)
        assert cases.largest_difference(packed[:, part], alone) <= 1e-5
        assert cases.largest_difference(mixed[:, part], alone) > 1e-2


def test_packed_documents_give_what_each_gives_alone():
    model, params = built("local_and_global")
    lengths = (5, 9, 4)
    ids = cases.tokens(model, 1, 20)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2])[None, :]
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None, :]
    batch = {"inputs": ids, "segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    packed = hidden(model, params, batch)
    across = hidden(model, params, {"inputs": ids})
    starts = np.cumsum([0, *lengths])
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        alone = hidden(model, params, {"inputs": ids[:, start:end]})
        assert cases.largest_difference(packed[:, start:end], alone) <= 1e-5
        assert start == 0 or cases.largest_difference(across[:, start:end], alone) > 1e-2


@pytest.mark.parametrize("case", ["llama_grouped_tied", "gpt2", "local_and_global", "t5", "t5_gated"])
def test_cached_decoding_gives_what_the_full_forward_gives(case):
    """Two rows of different length, a prompt in two parts (one longer than a window's ring), then single steps."""
    model, params = built(case)
    total, lengths = 16, np.array([7, 4])  # tokens of the first part; row 1 is padded to 7
    ids = cases.tokens(model, 2, total + 3)
    whole = np.asarray(hidden(model, params, {"inputs": ids, **source(model, 2)}))

    @functools.partial(jax.jit, compiler_options=FAST)
    def start(params):
        return model.start(params, source(model, 2), rows=2, length=total + 3)

    @functools.partial(jax.jit, compiler_options=FAST)
    def step(params, cache, batch):
        out = model.apply(params, batch, cache=cache)
        return out.hidden_BTD, out.cache

    cache, done = start(params), np.zeros(2, int)
    for width in (7, 5, 1, 1, 1, 1):
        real = np.minimum(lengths, width) if width == 7 else np.full(2, width)
        columns = done[:, None] + np.arange(width)[None, :]
        valid = np.arange(width)[None, :] < real[:, None]
        batch = {
            "inputs": jnp.asarray(np.where(valid, np.take_along_axis(np.asarray(ids), columns, axis=1), 0)),
            "positions": jnp.asarray(columns, jnp.int32),
            "segment_ids": jnp.asarray(valid, jnp.int32),
        }
        out, cache = step(params, cache, batch)
        expected = np.take_along_axis(whole, columns[..., None], axis=1)
        assert cases.largest_difference(np.asarray(out)[valid], expected[valid]) <= 1e-5
        done += real
    assert done.tolist() == [16, 13]


@pytest.mark.parametrize("case", ["llama_grouped_tied", "gpt2", "local_and_global", "t5"])
def test_a_prompt_is_prefilled_into_chosen_rows_and_decoding_goes_on_from_it(case):
    """Rows 3 and 1 of 5 held longer texts; the others stay, bit for bit."""
    model, params = built(case)
    ids = cases.tokens(model, 5, 10)
    whole = np.asarray(hidden(model, params, {"inputs": ids, **source(model, 5)}))
    batch = {"inputs": ids, "positions": jnp.tile(jnp.arange(10), (5, 1))}

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(params):
        held = model.apply(params, batch, cache=model.start(params, source(model, 5), rows=5, length=12)).cache
        segments = jnp.asarray([[1] * 7, [1] * 4 + [0] * 3])
        new = model.prefill(params, held, {"inputs": ids[:2, :7], "segment_ids": segments}, jnp.asarray([3, 1]))
        tokens, positions = jnp.stack([ids[1, 4], ids[0, 7]])[:, None], jnp.asarray([[4], [7]])
        everyone = {"inputs": jnp.zeros((5, 1), jnp.int32), "positions": jnp.full((5, 1), -1)}
        step = {
            "inputs": everyone["inputs"].at[jnp.asarray([1, 3])].set(tokens),
            "positions": everyone["positions"].at[jnp.asarray([1, 3])].set(positions),
        }
        return held, new, model.apply(params, step, cache=new.cache)

    held, new, after = run(params)
    assert cases.largest_difference(new.hidden_BTD[0], whole[0, :7]) <= 1e-5
    assert cases.largest_difference(new.hidden_BTD[1, :4], whole[1, :4]) <= 1e-5
    assert cases.largest_difference(after.hidden_BTD[3, 0], whole[0, 7]) <= 1e-5
    assert cases.largest_difference(after.hidden_BTD[1, 0], whole[1, 4]) <= 1e-5
    for window, ring in held["self"].rings.items():
        other = new.cache["self"].rings[window]
        for name in ("k", "v"):
            np.testing.assert_array_equal(getattr(ring, name)[:, [0, 2, 4]], getattr(other, name)[:, [0, 2, 4]])
        np.testing.assert_array_equal(ring.positions[np.array([0, 2, 4])], other.positions[np.array([0, 2, 4])])
        assert not np.array_equal(ring.positions[3], other.positions[3])


def abstract(specs):
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)


@pytest.mark.parametrize(("windows", "layers"), [((0, 64), 4), ((0, 64), 5), ((64,) * 5 + (0,), 8)])
def test_a_decode_step_copies_neither_cache_nor_weights_whatever_the_pattern(windows, layers):
    model = cases.model("llama", windows=windows, layers=layers, width=64, head_size=16, max_length=2048)

    def step(params, cache, ids, positions):
        return model.apply(params, {"inputs": ids, "positions": positions}, cache=cache)

    cache, row = abstract(model.cache_specs(4, 2048)), jax.ShapeDtypeStruct((4, 1), "int32")
    compiled = jax.jit(step, donate_argnums=1).lower(abstract(model.specs()), cache, row, row).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    one_layer = 2 * 4 * 2048 * 4 * 16 * 4  # keys and values of one layer that sees all
    assert temporaries < 2.5 * one_layer, (temporaries, one_layer)


def test_a_long_prefill_needs_no_more_memory_than_the_forward_pass_of_training():
    model = cases.model("llama", width=64, head_size=16, max_length=2048)
    row = jax.ShapeDtypeStruct((1, 2048), "int32")
    batch = {"inputs": row, "segment_ids": row}
    params, cache = abstract(model.specs()), abstract(model.cache_specs(1, 2048))

    def forward(params, batch):
        return model.apply(params, batch).hidden_BTD

    def prefill(params, cache, batch):
        return model.prefill(params, cache, batch, jnp.zeros(1, jnp.int32))

    training = jax.jit(forward).lower(params, batch).compile()
    compiled = jax.jit(prefill, donate_argnums=1).lower(params, cache, batch).compile()
    ours, theirs = (program.memory_analysis().temp_size_in_bytes for program in (compiled, training))
    kept = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))  # what a prefill is for: all keys and values
    assert ours <= theirs + 1.1 * kept, (ours, theirs, kept)


def test_a_cache_may_hold_more_than_the_layers_entries():
    """The period of layers comes from the config, not from how much a cache holds."""
    model, params = built("local_and_global")
    batch = {"inputs": cases.tokens(model, 2, 4), "positions": jnp.arange(4, dtype=jnp.int32)[None].repeat(2, axis=0)}

    def step(cache):
        return model.apply(params, batch, cache=cache).cache

    cache = jax.eval_shape(lambda: model.init_cache(2, 8) | {"other": jnp.ones(3)})
    assert set(cache) == {"self", "other"}
    assert jax.eval_shape(step, cache) == cache


def test_cache_of_a_windowed_layer_is_a_ring_of_that_many_slots():
    model, _ = built("local_and_global")
    rings = model.cache_specs(2, 40)["self"].rings
    assert rings[3].k.shape == (3, 2, 4, 3, 8)  # layers 0, 2, 4 with a window of 3
    assert rings[0].k.shape == (2, 2, 4, 40, 8)


def test_dropout_needs_a_key_and_depends_on_it_alone():
    model = cases.model("gpt2", dropout=0.5)
    params = cases.random_params(model)
    batch = {"inputs": cases.tokens(model, 2, 8)}
    plain = hidden(built("gpt2")[0], params, batch)
    off = hidden(model, params, batch)
    one, again, two = (hidden(model, params, batch, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(off, plain)
    np.testing.assert_array_equal(one, again)
    assert cases.largest_difference(one, off) > 0.1
    assert cases.largest_difference(one, two) > 0.1


def test_gradients_are_in_the_type_of_the_masters_and_hidden_states_in_that_of_compute():
    model, params = built("llama_grouped_tied")
    half = dataclasses.replace(model, dtypes=dataclasses.replace(model.dtypes, compute="bfloat16"))
    batch = {"inputs": cases.tokens(model, 1, 8)}
    out = jax.eval_shape(lambda p: half.apply(p, batch).hidden_BTD, params)
    gradients = jax.eval_shape(jax.grad(lambda p: half.apply(p, batch).hidden_BTD.astype(jnp.float32).sum()), params)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "final_norm": {}}, "parameter 'final_norm/scale' is missing"),
        (lambda p: {**p, "more": p["final_norm"]["scale"]}, "parameter 'more' is unknown"),
        (lambda p: {**p, "final_norm": {"scale": jnp.ones(31)}}, r"'final_norm/scale' has shape \(31,\)"),
    ],
)  # fmt: skip
def test_a_tree_of_other_names_or_shapes_is_refused(change, message):
    model, params = built("llama")
    with pytest.raises(ValueError, match=message):
        model.apply(change(params), {"inputs": jnp.zeros((1, 4), jnp.int32)})


def test_rows_longer_than_max_length_are_refused():
    model, params = built("llama")
    with pytest.raises(UserError, match="65 tokens is longer than config.model.max_length=64"):
        model.apply(params, {"inputs": jnp.zeros((1, 65), jnp.int32)})


def test_model_is_a_value():
    assert cases.model("llama") == cases.model("llama") and hash(cases.model("llama")) == hash(cases.model("llama"))
    assert cases.model("llama") != cases.model("llama", windows=(3,))


def test_a_layer_of_theta_0_knows_no_positions():
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 8)), jnp.int32)
    stretched = jnp.asarray(3 * np.arange(8)[None].repeat(2, 0), jnp.int32)

    def both(thetas):
        rope = {"theta": thetas, "scaling": {"name": "none"}}
        model = cases.model("llama", windows=(0, 0), rope=rope)
        params = cases.random_params(model)
        attention = params["layers"]["attention"]
        attention["o"] = attention["o"].at[1].set(0.0)  # the second layer's attention says nothing
        run = jax.jit(lambda **batch: model.apply(params, batch).hidden_BTD)
        return run(inputs=ids), run(inputs=ids, positions=stretched)

    plain, other = both((100.0, 0.0))
    assert np.abs(plain - other).max() > 0.01
    np.testing.assert_array_equal(*both((0.0, 100.0)))
