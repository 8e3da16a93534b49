"""Reward models and DPO against their formulas in numpy at float64, and what holds of them by construction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core import tree
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.objectives import dpo, pairs, reward
from t5x_like.objectives.interface import frozen_role, policy
from t5x_like.peft.attach import ROOT
from tests.models import cases
from tests.peft.test_lora import adapted

ROWS, LENGTH = 8, 10
NAMES = ("inputs", "targets", "loss_weights", "segment_ids", "positions")
ARRAYS = {
    f"{side}/{name}": ArraySpec((ROWS, LENGTH), "int32", ("batch", "length")) for side in pairs.SIDES for name in NAMES
}
LOGPS = {f"{side}/{dpo.LOGP}": ArraySpec((ROWS,), "float32", ("batch",)) for side in pairs.SIDES}


@functools.cache
def world():
    """(model, its parameters, those of a reference, batch): answers of many lengths, the last pair is padding."""
    model = cases.model("llama", scalar_heads=("reward",))
    rng = np.random.default_rng(0)
    batch = {}
    columns = np.arange(LENGTH)
    prompts = rng.integers(1, 4, ROWS)
    for side in pairs.SIDES:
        ids = rng.integers(0, model.config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
        lengths = rng.integers(5, LENGTH + 1, ROWS)
        lengths[-1] = 0 if side == "rejected" else lengths[-1]
        inside = columns < lengths[:, None]
        batch |= {
            f"{side}/inputs": np.where(inside, ids[:, :-1], 0),
            f"{side}/targets": np.where(inside, ids[:, 1:], 0),
            f"{side}/loss_weights": (inside & (columns >= prompts[:, None])).astype(np.float32),
            f"{side}/segment_ids": inside.astype(np.int32),
            f"{side}/positions": np.where(inside, columns, 0).astype(np.int32),
        }
    reference = cases.random_params(model, seed=1)
    return model, cases.random_params(model), reference, {name: jnp.asarray(x) for name, x in batch.items()}


def logp_by_definition(params, side, *, mean=False):
    """[ROWS] in float64, from the model's hidden states."""
    model, _, _, batch = world()
    one = {name: batch[f"{side}/{name}"] for name in NAMES}
    hidden = np.asarray(jax.jit(lambda p: model.apply(p, one).hidden_BTD)(params), np.float64)
    logits = hidden @ np.asarray(params["head"]["weight"], np.float64)[: model.config.vocab_size].T
    logz = np.log(np.exp(logits).sum(-1))
    each = np.take_along_axis(logits, np.asarray(one["targets"])[..., None], -1)[..., 0] - logz
    weights = np.asarray(one["loss_weights"], np.float64)
    total = (each * weights).sum(1)
    return total / np.maximum(weights.sum(1), 1) if mean else total


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def build_dpo(**settings):
    model = world()[0]
    config = dpo.DpoConfig(
        **{"beta": 0.3, "label_smoothing": 0.0, "length_normalized": False, "reference": "role"} | settings
    )
    config.check("config.objective.dpo")
    roles = {"policy": policy(model), "reference": frozen_role(model, "reference")}
    return dpo.build(config, roles, ARRAYS | (LOGPS if config.reference == "cache" else {}))


def run(objective, params, frozen, batch):
    def loss(params):
        return objective.loss(params, frozen, batch, None, objective.weights(batch))

    (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), {name: float(total / count) for name, (total, count) in sums.items()}, tree.flatten(gradients)


CASES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.2},
    "mean": {"length_normalized": True},
    "no_reference": {"reference": "none"},
    "cached": {"reference": "cache"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_dpo_is_that_of_its_formula(name):
    settings = CASES[name]
    _, params, reference, batch = world()
    mean = settings.get("length_normalized", False)
    logp, its = ([logp_by_definition(p, side, mean=mean) for side in pairs.SIDES] for p in (params, reference))
    if settings.get("reference") == "none":
        its = [np.zeros(ROWS), np.zeros(ROWS)]
    rewards = [0.3 * (mine - ref) for mine, ref in zip(logp, its, strict=True)]
    margin, smooth = rewards[0] - rewards[1], settings.get("label_smoothing", 0.0)
    expected = -(1 - smooth) * log_sigmoid(margin) - smooth * log_sigmoid(-margin)
    real = slice(0, ROWS - 1)  # the last pair has no rejected answer
    assert np.abs(margin[real]).max() > 0.3 and (margin[real] > 0).any() and (margin[real] < 0).any()
    if settings.get("reference") == "cache":
        batch = batch | {
            f"{side}/{dpo.LOGP}": jnp.asarray(x, jnp.float32) for side, x in zip(pairs.SIDES, its, strict=True)
        }
    frozen = {"base": {}, "reference": reference}
    value, means, _ = run(build_dpo(**settings), params, frozen, batch)
    assert value == pytest.approx(expected[real].mean(), rel=1e-5)
    assert means["margin"] == pytest.approx(margin[real].mean(), rel=1e-4)
    assert means["accuracy"] == pytest.approx((margin[real] > 0).mean())
    assert means["logp_chosen"] == pytest.approx(logp[0][real].mean(), rel=1e-5)


def test_before_the_first_update_the_loss_is_log_2_and_the_gradient_is_that_of_half_a_pair():
    _, params, _, batch = world()
    value, means, gradients = run(build_dpo(), params, {"base": {}, "reference": params}, batch)
    assert value == pytest.approx(np.log(2), rel=1e-6) and abs(means["margin"]) < 1e-6

    def half(params):
        model = world()[0]
        logp = dpo.answer_logp(policy(model), params, {"base": {}}, pairs.texts(batch), mean=False, key=None)
        chosen, rejected = pairs.sides(logp)
        return -0.3 / 2 * jnp.mean((chosen - rejected)[: ROWS - 1])

    for path, gradient in tree.flatten(jax.jit(jax.grad(half))(params)).items():
        if path == "heads/reward/weight":  # which DPO does not read
            assert not np.any(gradients[path])
        else:
            assert cases.largest_difference(gradients[path], gradient) < 1e-5, path


def test_both_texts_of_a_pair_stand_side_by_side():
    batch = {"chosen/x": jnp.arange(3), "rejected/x": jnp.arange(3) + 10, "encoder_inputs": jnp.arange(3)}
    texts = pairs.texts(batch)
    assert texts["x"].tolist() == [0, 10, 1, 11, 2, 12] and texts["encoder_inputs"].tolist() == [0, 0, 1, 1, 2, 2]
    assert [side.tolist() for side in pairs.sides(texts["x"])] == [[0, 1, 2], [10, 11, 12]]


@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_the_loss_of_a_reward_model_is_that_of_its_formula(centering):
    model, params, _, batch = world()
    rewards = []
    for side in pairs.SIDES:
        one = {name: batch[f"{side}/{name}"] for name in NAMES}
        hidden = np.asarray(jax.jit(lambda p, one=one: model.apply(p, one).hidden_BTD)(params), np.float64)
        last = np.maximum(np.asarray(one["segment_ids"]).sum(1) - 1, 0)
        rewards.append(hidden[np.arange(ROWS), last] @ np.asarray(params["heads"]["reward"]["weight"], np.float64))
    chosen, rejected = (x[: ROWS - 1] for x in rewards)
    expected = np.mean(-log_sigmoid(chosen - rejected) + centering * (chosen + rejected) ** 2)
    objective = reward.build(reward.RewardConfig(centering), {"policy": policy(model)}, ARRAYS)
    value, means, gradients = run(objective, params, {"base": {}}, batch)
    assert value == pytest.approx(expected, rel=1e-5)
    assert means["margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
    assert means["accuracy"] == pytest.approx((chosen > rejected).mean())
    assert not np.any(gradients["head/weight"]) and np.any(gradients["heads/reward/weight"])


def test_a_reward_model_needs_its_head():
    model = cases.model("llama")
    with pytest.raises(UsageError, match=r"set config.model.scalar_heads=\('reward',\)"):
        reward.build(reward.RewardConfig(0.0), {"policy": policy(model)}, ARRAYS)


def test_the_reference_of_an_adapter_may_be_its_base():
    """As if the base were a second model; an adapter that was just made is its reference."""
    model, _, _, batch = world()
    adapter, whole = adapted(model)
    base = {name: part for name, part in whole.items() if name != ROOT}
    params = {ROOT: whole[ROOT]}
    roles = {"policy": policy(model, adapter.attach), "base": frozen_role(model, "base")}
    roles["reference"] = frozen_role(model, "reference")

    def loss(which, params):
        objective = dpo.build(dpo.DpoConfig(0.3, 0.0, False, which), roles, ARRAYS)
        return run(objective, params, {"base": base, "reference": base}, batch)[0]

    assert loss("base", params) == loss("role", params) != pytest.approx(np.log(2), rel=1e-3)
    new = {ROOT: tree.map_with_path(lambda path, x: x * (not path.endswith("/b")), whole[ROOT])}
    assert loss("base", new) == pytest.approx(np.log(2), rel=1e-6)
    with pytest.raises(UsageError, match="reference='base' is the policy without its adapter"):
        dpo.build(dpo.DpoConfig(0.3, 0.0, False, "base"), {"policy": policy(model)}, ARRAYS)
