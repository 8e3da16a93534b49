"""Answers that share their prompt: the same numbers as with a row for each, for models of all kinds and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.types import ArraySpec
from t5x_like.data.read.rollouts import branched_arrays
from t5x_like.objectives import grpo
from t5x_like.objectives.grpo import GrpoConfig
from t5x_like.objectives.interface import policy
from t5x_like.parallel.sharding import abstract_batch, tree_shardings
from t5x_like.rl.rollout import together
from t5x_like.rl.rows import OneARow, RowShape, SeveralARow
from t5x_like.rl.scoring import scoring_function
from tests.layers.scoring.world import FAST, make_mesh
from tests.models import cases

ROOM, NEW, COUNT = 7, 6, 2
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]
ANSWERS, ROWS = len(PROMPTS) * COUNT, len(PROMPTS)
CONFIG = GrpoConfig(0.2, 0.28, 0.05, "base", "sequence", 0, 0.8)
EVERY = [ids for ids in PROMPTS for _ in range(COUNT)]


def world():
    """Answers of all lengths, the longest and the shortest among them, with what an update reads of them."""
    rng = np.random.default_rng(0)
    lengths = np.array([NEW, 3, 1, 5, 2, NEW, 4, 1])
    logp = rng.normal(-4.0, 1.0, (3, ANSWERS, NEW)).astype(np.float32)
    return {
        "tokens": rng.integers(3, 60, (ANSWERS, NEW)).astype(np.int32),
        "lengths": lengths,
        "scores": dict(zip(("old_logp", "reference_logp", "rollout_logp"), logp, strict=True)),
        "numbers": {
            "advantages": rng.normal(size=ANSWERS).astype(np.float32),
            "on_policy": (np.arange(ANSWERS) % 2).astype(np.float32),
        },
    }


def layouts():
    lengths = world()["lengths"]
    alone = OneARow(EVERY, lengths, RowShape(ROOM + NEW - 1, 0, 0), NEW)
    return {"alone": alone, "shared": SeveralARow(EVERY, lengths, COUNT, ROOM, NEW)}


def batch(kind):
    given, layout = world(), layouts()[kind]
    arrays = layout.arrays(given["tokens"])
    arrays |= {name: layout.placed(values) for name, values in given["scores"].items()}
    return arrays | {name: layout.one_each(values) for name, values in given["numbers"].items()}


def specs():
    return branched_arrays(rows=ROWS, room=ROOM, answers=COUNT, tokens=NEW)


def loss_and_gradients(model, params, arrays):
    made = grpo.build(CONFIG, {"policy": policy(model)}, specs())

    def loss(params, arrays):
        return made.loss(params, {"base": {}}, arrays, None, made.weights(arrays))

    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)(params, arrays)
    return float(value), {name: float(a / b) for name, (a, b) in sums.items()}, jax.device_get(gradients)


def assert_alike(mine, others):
    """max|a - b| <= 2e-5 max|b| for each leaf; biases of keys, whose gradient is zero, by the largest of all."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(others))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(others), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * max(np.abs(b).max(), 1e-3 * largest)


def test_arrays_are_those_of_the_specs():
    found, expected = batch("shared"), specs()
    assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in expected.items()
    }


def test_a_row_holds_a_prompt_and_its_answers():
    layout = SeveralARow([[1, 2], [1, 2]], np.array([3, 1]), 2, 3, 3)
    found = layout.arrays(np.array([[7, 8, 9], [5, 0, 0]]))
    assert found["inputs"].tolist() == [[0, 1, 2]]
    assert found["branches"].tolist() == [[[7, 8], [0, 0]]]
    assert found["segment_ids"].tolist() == [[0, 1, 1, 1, 1, 0, 0]]
    assert found["positions"].tolist() == [[0, 0, 1, 2, 3, 2, 3]]
    assert found["targets"].tolist() == [[[7, 8, 9], [5, 0, 0]]]
    assert found["loss_weights"].tolist() == [[[1, 1, 1], [1, 0, 0]]]


def test_what_is_placed_is_taken_again():
    values = world()["scores"]["old_logp"]
    alone, shared = (layout.taken(layout.placed(values)) for layout in layouts().values())
    assert (alone == shared).all() and (alone != 0).sum() == world()["lengths"].sum()


@pytest.mark.parametrize("case", ["llama_grouped_tied", "gpt2", "local_and_global", "alibi"])
def test_loss_metrics_and_gradients_equal_those_of_a_row_each(case):
    """Rotary and learned positions, grouped heads, windows with softcaps, position biases."""
    model = cases.model("llama", position="alibi") if case == "alibi" else cases.model(case)
    params = cases.random_params(model)
    value, sums, gradients = loss_and_gradients(model, params, batch("alone"))
    found = loss_and_gradients(model, params, batch("shared"))
    assert abs(value) > 1e-3
    assert found[0] == pytest.approx(value, rel=1e-5)
    assert found[1] == pytest.approx(sums, rel=1e-4, abs=1e-6)
    assert_alike(found[2], gradients)


def test_answers_do_not_see_one_another():
    """Another first answer changes its own log-probabilities, and no others."""
    model = cases.model("llama")
    params = cases.random_params(model)
    role, arrays = policy(model), batch("shared")

    def logp(arrays):
        read = {name: jnp.asarray(x) for name, x in arrays.items()}
        return np.asarray(grpo.score(role, params, {"base": {}}, read, want=("logp",), config=CONFIG).logp)

    before = logp(arrays)
    arrays["branches"] = arrays["branches"].copy()
    arrays["branches"][0, 0, 0] += 1
    changed = np.abs(logp(arrays) - before).max(axis=1) > 1e-6
    assert changed.tolist() == [True] + [False] * (ANSWERS - 1)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_scores_before_the_updates_are_equal_too(micro_batches):
    model = cases.model("llama")
    params, found = cases.random_params(model), {}
    for kind, layout in layouts().items():
        arrays = {name: x for name, x in batch(kind).items() if name not in ("loss_weights", *world()["numbers"])}
        arrays = {name: x for name, x in arrays.items() if not name.endswith("logp")}
        axes = {name: ArraySpec(x.shape, "int32", ("batch", *(None,) * (x.ndim - 1))) for name, x in arrays.items()}
        score = scoring_function(policy(model), CONFIG, rules=model.rules, inputs=axes, micro_batches=micro_batches)
        logp = jax.jit(score, compiler_options=FAST)(params, {"base": {}}, arrays)
        found[kind] = layout.taken(np.asarray(logp))
    assert np.abs(found["alone"]).max() > 1
    assert np.abs(found["shared"] - found["alone"]).max() < 2e-5


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}])
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(sizes):
    model = cases.model("llama")
    params, arrays = cases.random_params(model), batch("shared")
    value, _, gradients = loss_and_gradients(model, params, arrays)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        wanted = abstract_batch(mesh, model.rules, specs())
        placed = {name: jax.device_put(x, wanted[name].sharding) for name, x in arrays.items()}
        laid = jax.tree.map(jax.device_put, params, tree_shardings(mesh, model.rules, model.specs()))
        found, _, others = loss_and_gradients(model, laid, placed)
    assert found == pytest.approx(value, rel=1e-5)
    assert_alike(others, gradients)


def test_a_prompt_is_shared_by_as_many_answers_as_whole_shards_allow():
    assert together(64, 8, 1) == 8 and together(64, 8, 64) == 1 and together(24, 8, 2) == 4
