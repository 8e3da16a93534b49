"""The scorer against full logits: values, every gradient, every mesh, and what it costs in collectives."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from t5x_like.layers.scoring import head_layout
from t5x_like.layers.scoring.head import Head, logits
from t5x_like.layers.scoring.token_scores import WANTED, token_scores
from t5x_like.parallel import rules
from tests.layers.scoring.world import FAST, MESHES, REAL, TABLE, B, D, T, V, count, make_mesh


def arrays(rows=B, length=T, seed=0):
    random = np.random.default_rng(seed)
    x_BTD = random.standard_normal((rows, length, D), np.float32)
    weight_VD = 0.5 * random.standard_normal((V, D), np.float32)
    bias_V = random.standard_normal(V, np.float32)
    targets_BT = random.integers(0, REAL, (rows, length), np.int32)
    targets_BT[0, :3] = (0, REAL - 1, 127)  # first and last of the vocabulary and of a shard
    cotangents = random.standard_normal((2, rows, length), np.float32)
    return x_BTD, weight_VD, bias_V, targets_BT, cotangents


def full_logits(x_BTD, head, targets_BT):
    """The definition, from the whole matrix of logits; written out on its own."""
    values = jnp.einsum("BTD,VD->BTV", x_BTD, head.weight, precision="highest")
    values = values if head.bias is None else values + head.bias[None, None, :]
    values = values if head.softcap is None else head.softcap * jnp.tanh(values / head.softcap)
    values = values[:, :, : head.vocab_size]
    logz_BT = jax.nn.logsumexp(values, axis=-1)
    return jnp.take_along_axis(values, targets_BT[..., None], axis=-1)[..., 0] - logz_BT, logz_BT


def log_probs(x_BTD, head, targets_BT, *, chunk=None):
    scores = token_scores(x_BTD, head, targets_BT, want=("logp", "logz"), chunk=chunk)
    return scores.logp, scores.logz


def best_tokens(x_BTD, head):
    return token_scores(x_BTD, head, want=("best",)).best


def value_and_gradients(score, head_of, x_BTD, weight_VD, bias_V, targets_BT, cotangents):
    """A sum in which every token has its own cotangents, and its gradients."""

    def total(x_BTD, weight_VD, bias_V):
        logp_BT, logz_BT = score(x_BTD, head_of(weight_VD, bias_V), targets_BT)
        return jnp.sum(cotangents[0] * logp_BT + cotangents[1] * logz_BT)

    return jax.value_and_grad(total, argnums=(0, 1, 2))(x_BTD, weight_VD, bias_V)


def head_of(weight_VD, bias_V, *, softcap=None):
    return Head(weight=weight_VD, bias=bias_V, vocab_size=REAL, softcap=softcap, rules=TABLE)


@functools.cache
def expected(softcap, with_bias):
    x, weight, bias, targets, cotangents = arrays()
    run = functools.partial(value_and_gradients, full_logits, functools.partial(head_of, softcap=softcap))
    return jax.jit(run, compiler_options=FAST)(x, weight, bias if with_bias else None, targets, cotangents)


def assert_same(results, references):
    np.testing.assert_allclose(results[0], references[0], rtol=1e-6)
    for result, reference in zip(jax.tree.leaves(results[1]), jax.tree.leaves(references[1]), strict=True):
        assert np.abs(reference).max() > 0.1
        assert np.abs(result - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("chunk", [0, 7, 16, 1000], ids="chunk{}".format)
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (3.0, True)], ids=["plain", "softcap_bias"])
def test_scores_and_gradients_equal_those_of_full_logits(softcap, with_bias, chunk):
    x, weight, bias, targets, cotangents = arrays()
    score = functools.partial(log_probs, chunk=chunk)
    run = functools.partial(value_and_gradients, score, functools.partial(head_of, softcap=softcap))
    results = jax.jit(run, compiler_options=FAST)(x, weight, bias if with_bias else None, targets, cotangents)
    assert_same(results, expected(softcap, with_bias))
    assert np.all(np.asarray(results[1][1])[REAL:] == 0)  # padding of the vocabulary learns nothing


@pytest.mark.parametrize("chunk", [0, 16], ids=["kept", "chunks"])
def test_blocks_of_columns_give_the_same_as_the_whole(chunk, monkeypatch):
    monkeypatch.setattr(head_layout, "CPU_COLUMNS", 100)
    assert head_layout._blocks(V) == ((0, 100), (100, 200), (200, V))
    x, weight, bias, targets, cotangents = arrays()
    score = functools.partial(log_probs, chunk=chunk)
    run = functools.partial(value_and_gradients, score, functools.partial(head_of, softcap=3.0))
    with jax.set_mesh(make_mesh({"fsdp": 4})):
        results = jax.jit(run, compiler_options=FAST)(x, weight, bias, targets, cotangents)
        best_BT = jax.jit(best_tokens)(x, head_of(weight, bias))
    assert_same(results, expected(3.0, True))
    np.testing.assert_array_equal(best_BT, np.argmax(jax.jit(logits)(x, head_of(weight, bias)), axis=-1))


@pytest.mark.parametrize("chunk", [0, 4], ids=["kept", "chunks"])
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_what_one_device_gives(name, chunk):
    x, weight, bias, targets, cotangents = arrays()
    mesh = make_mesh(MESHES[name])
    score = functools.partial(log_probs, chunk=chunk)
    run = functools.partial(value_and_gradients, score, functools.partial(head_of, softcap=3.0))
    placed = place(mesh, x, weight, bias, targets)
    with jax.set_mesh(mesh):
        results = jax.jit(run, compiler_options=FAST)(*placed, cotangents)
    assert_same(results, expected(3.0, True))


SCALE, TEMPERATURE = 0.7, 1.5
FLOATS = ("logp", "logz", "entropy", "mean")


def reference_scores(x_BTD, weight_VD, bias_V, targets_BT, softcap):
    """The definitions, in float64 by torch: {name: [B, T]} and the best tokens."""
    values = SCALE * torch.einsum("BTD,VD->BTV", x_BTD, weight_VD)
    values = values if bias_V is None else values + bias_V
    values = values if softcap is None else softcap * torch.tanh(values / softcap)
    values = values[:, :, :REAL] / TEMPERATURE
    logs = torch.log_softmax(values, dim=-1)
    picked = torch.gather(logs, -1, targets_BT[..., None])[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    found = {"logp": picked, "logz": values.logsumexp(-1), "entropy": entropy, "mean": values.mean(-1)}
    return found, values.argmax(-1)


@functools.cache
def expected_scores(softcap, with_bias, want):
    """({name: values}, gradients of x, weight and bias) of sums with a cotangent for each token and name."""
    x, weight, bias, targets, cotangents = arrays()
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, weight, bias)]
    leaves = leaves if with_bias else leaves[:2]
    found, best = reference_scores(*leaves[:2], leaves[2] if with_bias else None, torch.tensor(targets).long(), softcap)
    floats = [name for name in want if name != "best"]
    total = sum((torch.tensor(cotangents[i % 2]) * (i + 1) * found[name]).sum() for i, name in enumerate(floats))
    gradients = [g.numpy() for g in torch.autograd.grad(total, leaves)]
    return {name: found[name].detach().numpy() for name in floats} | {"best": best.numpy()}, gradients


def assert_scores_are_those_of_the_definition(want, softcap, with_bias, chunk, sizes=None):
    x, weight, bias, targets, cotangents = map(jnp.asarray, arrays())
    floats = [name for name in want if name != "best"]

    def total(x_BTD, weight_VD, bias_V):
        head = Head(weight=weight_VD, bias=bias_V, vocab_size=REAL, softcap=softcap, rules=TABLE, scale=SCALE)
        scores = token_scores(x_BTD, head, targets, want=want, temperature=TEMPERATURE, chunk=chunk)
        values = [cotangents[i % 2] * (i + 1) * getattr(scores, name) for i, name in enumerate(floats)]
        return sum(map(jnp.sum, values)), scores

    inputs = (x, weight, bias if with_bias else None)
    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), compiler_options=FAST)
    with jax.set_mesh(make_mesh(sizes)) if sizes else contextlib.nullcontext():
        (_, scores), gradients = run(*inputs)
    found, references = expected_scores(softcap, with_bias, want)
    assert [name for name in WANTED if getattr(scores, name) is not None] == [n for n in WANTED if n in want]
    for name in floats:
        np.testing.assert_allclose(getattr(scores, name), found[name], rtol=1e-5, atol=2e-6, err_msg=name)
    if "best" in want:
        np.testing.assert_array_equal(scores.best, found["best"])
    for gradient, reference in zip(jax.tree.leaves(gradients), references, strict=True):
        assert np.abs(reference).max() > 1e-4
        assert np.abs(gradient - reference).max() <= 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("chunk", [0, 7], ids=["kept", "chunks"])
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (3.0, True)], ids=["plain", "softcap_bias"])
def test_all_scores_of_one_pass_and_their_gradients_are_the_definitions(softcap, with_bias, chunk):
    assert_scores_are_those_of_the_definition(WANTED, softcap, with_bias, chunk)


@pytest.mark.parametrize("want", [("logp",), ("entropy",), ("mean", "best"), ("logz", "best")], ids="+".join)
def test_any_selection_of_scores_can_be_differentiated(want):
    assert_scores_are_those_of_the_definition(want, 3.0, True, 7)


@pytest.mark.parametrize("chunk", [0, 4], ids=["kept", "chunks"])
@pytest.mark.parametrize("name", ["fsdp8", "tensor8", "data2_fsdp2_tensor2"])
def test_all_scores_are_the_same_on_every_mesh(name, chunk):
    assert_scores_are_those_of_the_definition(WANTED, 3.0, True, chunk, MESHES[name])


def test_wishes_that_cannot_be_met_are_refused():
    x, weight, _, targets, _ = map(jnp.asarray, arrays())
    with pytest.raises(ValueError, match="want=.'perplexity'. should name some of logp, logz"):
        token_scores(x, head_of(weight, None), targets, want=("perplexity",))
    with pytest.raises(ValueError, match="needs targets"):
        token_scores(x, head_of(weight, None), want=("logp",))


def place(mesh, x, weight, bias, targets):
    axes = (("batch", "length", "act_embed"), ("vocab", "embed"), ("vocab",), ("batch", "length"))
    values = (x, weight, bias, targets)
    return [
        jax.device_put(value, NamedSharding(mesh, TABLE.spec(names, value.shape, dict(mesh.shape))))
        for value, names in zip(values, axes, strict=True)
    ]


@pytest.mark.parametrize(
    "overrides",
    ["vocab=fsdp+tensor", "vocab=tensor+fsdp,embed=", "embed=tensor,vocab=", "vocab=,embed=data+fsdp", "batch=data"],
)
def test_any_table_of_axes_gives_what_one_device_gives(overrides):
    x, weight, bias, targets, cotangents = arrays()
    if overrides == "vocab=fsdp+tensor":
        overrides += ",embed="
    table = rules.rules(overrides)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def head(weight_VD, bias_V):
        return Head(weight=weight_VD, bias=bias_V, vocab_size=REAL, softcap=3.0, rules=table)

    score = functools.partial(log_probs, chunk=4)
    run = functools.partial(value_and_gradients, score, head)
    with jax.set_mesh(mesh):
        results = jax.jit(run, compiler_options=FAST)(x, weight, bias, targets, cotangents)
    assert_same(results, expected(3.0, True))


def test_one_row_on_many_devices_is_scored_by_all():
    """A dim of size 1 is not split: every device scores the same tokens, and the gradient counts them once."""
    x, weight, bias, targets, cotangents = arrays(rows=1)
    run = functools.partial(value_and_gradients, log_probs, head_of)
    reference = functools.partial(value_and_gradients, full_logits, head_of)
    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        results = jax.jit(run, compiler_options=FAST)(x, weight, bias, targets, cotangents)
    assert_same(results, jax.jit(reference, compiler_options=FAST)(x, weight, bias, targets, cotangents))


def test_the_head_is_gathered_once_a_direction_and_its_gradient_scattered_once():
    """On fsdp x tensor, with 4 chunks a device: nothing of this grows with the number of chunks."""
    x, weight, _, targets, cotangents = arrays()
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = place(mesh, x, weight, np.zeros(V, np.float32), targets)
    counts = []
    for chunk in (3, 12):
        score = functools.partial(log_probs, chunk=chunk)
        run = functools.partial(value_and_gradients, score, head_of)
        out = (None, (placed[0].sharding, placed[1].sharding, None))
        with jax.set_mesh(mesh):
            step = jax.jit(run, compiler_options=FAST, out_shardings=out)
            text = step.lower(placed[0], placed[1], None, placed[3], cotangents).compile().as_text()
        counts.append(count(text))
        assert ("while" in text) == (chunk == 3)  # 12 tokens are all that a device has
    # Reduced over tensor: the highest logit, the other sums, the gradient of x; over all: the value of the test's sum.
    assert counts[0] == counts[1]
    assert counts[0].pop("all-gather") in (1, 2)  # one, when the compiler keeps the first for the backward pass
    assert counts[0] == {"reduce-scatter": 1, "all-reduce": 4}


def test_best_tokens_beside_the_scores_cost_no_further_gather_of_the_head():
    x, weight, _, targets, _ = arrays()
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = place(mesh, x, weight, np.zeros(V, np.float32), targets)
    counts = []
    for want in (("logp",), ("logp", "best", "entropy")):

        def run(x_BTD, weight_VD, targets_BT, want=want):
            return token_scores(x_BTD, head_of(weight_VD, None), targets_BT, want=want, chunk=3)

        with jax.set_mesh(mesh):
            compiled = jax.jit(run, compiler_options=FAST).lower(placed[0], placed[1], placed[3]).compile()
        counts.append(count(compiled.as_text()))
    assert counts == [{"all-gather": 1, "all-reduce": 2}, {"all-gather": 1, "all-reduce": 3}]


def test_the_head_is_gathered_in_the_compute_type():
    x, weight, _, targets, cotangents = arrays()
    mesh = make_mesh({"fsdp": 8})
    placed = place(mesh, x.astype(jnp.bfloat16), weight, np.zeros(V, np.float32), targets)
    run = functools.partial(value_and_gradients, functools.partial(log_probs, chunk=3), head_of)
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(placed[0], placed[1], None, placed[3], cotangents).as_text()
    gathers = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert len(gathers) == 2 and all("bf16" in line and "f32" not in line for line in gathers)
    assert re.search(r"stablehlo.reduce_scatter.*?: \(tensor<16x256xf32>\)", text, re.DOTALL)


def test_memory_does_not_grow_to_full_logits():
    x, weight, _, targets, cotangents = arrays(rows=8, length=512)
    run = functools.partial(value_and_gradients, functools.partial(log_probs, chunk=64), head_of)
    kept = functools.partial(value_and_gradients, functools.partial(log_probs, chunk=0), head_of)
    temporaries = [
        jax.jit(f).lower(x, weight, None, targets, cotangents).compile().memory_analysis().temp_size_in_bytes
        for f in (run, kept)
    ]
    full = 4 * 8 * 512 * V
    assert temporaries[0] < full / 2 < full <= temporaries[1]


@pytest.mark.parametrize("sizes", [None, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_predictions_are_the_first_highest_real_logit(sizes):
    x, weight, bias, _, _ = arrays()
    weight[200] = weight[3]  # a tie across two shards of the vocabulary
    bias[200] = bias[3] = 50.0
    bias[REAL:] = 1000.0  # padding would win
    x[1] = 0.0
    head = head_of(weight, bias)
    if sizes is None:
        best_BT = jax.jit(best_tokens)(x, head)
    else:
        with jax.set_mesh(make_mesh(sizes)):
            best_BT = jax.jit(best_tokens)(x, head)
    all_BTV = jax.jit(logits)(x, head)
    assert np.isneginf(all_BTV[:, :, REAL:]).all()
    np.testing.assert_array_equal(best_BT[1], 3)
    np.testing.assert_array_equal(best_BT, np.argmax(all_BTV, axis=-1))


def test_logits_exponentiate_to_the_scores():
    x, weight, bias, targets, _ = arrays()
    head = head_of(weight, bias, softcap=5.0)
    logp_BT, logz_BT = jax.jit(log_probs)(x, head, targets)
    all_BTV = jax.jit(logits)(x, head)
    np.testing.assert_allclose(jax.nn.logsumexp(all_BTV, axis=-1), logz_BT, rtol=1e-6)
    picked_BT = jnp.take_along_axis(all_BTV, jnp.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(picked_BT - logz_BT, logp_BT, rtol=1e-5, atol=1e-6)


def test_pieces_are_chosen_by_size_and_platform():
    assert head_layout._rows(4096, 8192, None) == 0  # the benchmark model on a CPU: kept
    assert len(head_layout._blocks(8192)) == 16
    assert head_layout._rows(10, 8192, 64) == 10
    rows = head_layout._rows(4 * 4096, 128256, None)  # 8B on 64 chips, 4 rows each
    assert rows % head_layout.CHUNK_ROWS == 0
    assert head_layout.CHUNK_BYTES / 2 < 4 * rows * 128256 <= 1.1 * head_layout.CHUNK_BYTES
    device = type(make_mesh({}).abstract_mesh.abstract_device)(device_kind="TPU v5p", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        assert head_layout._blocks(8192) == ((0, 8192),)
