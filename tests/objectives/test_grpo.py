"""GRPO against its definition in numpy at float64 and against TRL's loss on fixed rollouts."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.objectives import grpo
from t5x_like.objectives.grpo import GrpoConfig
from t5x_like.rl.advantages import advantages, spread
from t5x_like.rl.config import AdvantageConfig

ROWS, LENGTH, KL, LOW, HIGH = 8, 12, 0.05, 0.2, 0.28
CONFIG = GrpoConfig(LOW, HIGH, KL, "base", "token", 0, 1.0)
CONSTANT = 16
CONFIGS = {
    "token": CONFIG,
    "sequence": dataclasses.replace(CONFIG, aggregation="sequence"),
    "constant": dataclasses.replace(CONFIG, aggregation="constant", constant=CONSTANT),
}
TRL = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}


def rollouts():
    """Log-probabilities far enough from the old ones that ratios are clipped on both sides; answers of all lengths."""
    rng = np.random.default_rng(0)
    logp = rng.normal(-2.0, 1.0, (ROWS, LENGTH))
    lengths = rng.integers(1, LENGTH + 1, ROWS)
    lengths[0] = LENGTH
    return {
        "logp": logp,
        "old_logp": logp + rng.normal(0.0, 0.3, logp.shape),
        "reference_logp": logp + rng.normal(0.0, 0.5, logp.shape),
        "rollout_logp": logp + rng.normal(0.0, 0.1, logp.shape),
        "loss_weights": (np.arange(LENGTH) < lengths[:, None]).astype(np.float64),
        "advantages": rng.normal(0.0, 1.0, ROWS),
        "on_policy": np.zeros(ROWS),
    }


def ours(config, world):
    """(loss, its gradient in logp, what is reported) in float32."""
    batch = {name: jnp.asarray(array, jnp.float32) for name, array in world.items()}

    def loss(logp):
        value, sums = grpo.terms(config, logp, batch)
        return value / grpo.total(config, batch["loss_weights"]), sums

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(batch["logp"])
    return float(value), np.asarray(gradient), {name: float(a / b) for name, (a, b) in sums.items()}


def oracle(config, world):
    """(loss, gradient, mean KL, shares of clipped tokens) in numpy at float64, the gradient written out."""
    logp, mask, A = world["logp"], world["loss_weights"], world["advantages"][:, None]
    ratio = np.exp(logp - world["old_logp"])
    clipped = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    d = world["reference_logp"] - logp
    each = -np.minimum(ratio * A, clipped * A) + config.kl_coefficient * (np.exp(d) - d - 1)
    passes = ratio * A <= clipped * A
    slope = np.where(passes, -ratio * A, 0.0) + config.kl_coefficient * (1 - np.exp(d))
    if config.aggregation == "token":
        share = mask / mask.sum()
    elif config.aggregation == "sequence":
        share = mask / mask.sum(axis=1, keepdims=True) / len(mask)
    else:
        share = mask / (len(mask) * config.constant)
    low = (ratio < 1 - config.clip_low) & (A < 0)
    high = (ratio > 1 + config.clip_high) & (A > 0)
    mean = [(mask * values).sum() / mask.sum() for values in (np.exp(d) - d - 1, low, high)]
    return (share * each).sum(), share * slope, *mean


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradient_and_metrics_equal_float64(name):
    config, world = CONFIGS[name], rollouts()
    loss, gradient, kl, low, high = oracle(config, world)
    value, found, reported = ours(config, world)
    assert low > 0.01 and high > 0.01 and kl > 0.01, "nothing is clipped, or no divergence: nothing is compared"
    assert value == pytest.approx(loss, rel=1e-6, abs=1e-7)
    assert np.abs(found - gradient).max() <= 1e-5 * np.abs(gradient).max()
    assert reported["loss"] == pytest.approx(value, rel=1e-6)
    assert reported["kl_token_mean"] == pytest.approx(kl, rel=1e-5)
    assert reported["clipped_low_fraction"] == pytest.approx(low, rel=1e-6)
    assert reported["clipped_high_fraction"] == pytest.approx(high, rel=1e-6)


def test_the_aggregations_differ():
    losses = [oracle(config, rollouts())[0] for config in CONFIGS.values()]
    assert len({round(loss, 4) for loss in losses}) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_equal_those_of_trl(name):
    """TRL's own loss function, given our log-probabilities in place of a model's."""
    torch, trainer = pytest.importorskip("torch"), pytest.importorskip("trl").GRPOTrainer
    config, world = CONFIGS[name], rollouts()
    as_torch = {key: torch.tensor(array, dtype=torch.float64) for key, array in world.items()}
    logp = as_torch["logp"].clone().requires_grad_()
    mask = as_torch["loss_weights"]
    accelerator = types.SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
    metrics = {"train": collections.defaultdict(list)}
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=accelerator,
        _metrics=metrics,
        loss_type=TRL[name],
        beta=config.kl_coefficient,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=CONSTANT,
    )
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones((ROWS, 3), dtype=torch.int64),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": as_torch["advantages"],
        "old_per_token_logps": as_torch["old_logp"],
        "ref_per_token_logps": as_torch["reference_logp"],
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(stub, None, inputs)
    theirs.backward()
    value, gradient, reported = ours(config, world)
    assert value == pytest.approx(theirs.item(), rel=1e-6, abs=1e-7)
    assert np.abs(gradient - logp.grad.numpy()).max() <= 1e-5 * np.abs(gradient).max()
    assert reported["kl_token_mean"] == pytest.approx(metrics["train"]["kl"][0], rel=1e-5)
    assert reported["clipped_low_fraction"] == pytest.approx(metrics["train"]["clip_ratio/low_mean"][0], rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_update_on_policy_has_ratio_1_and_clips_nothing_but_has_a_gradient(name):
    world = rollouts() | {"on_policy": np.ones(ROWS)}
    _, gradient, reported = ours(dataclasses.replace(CONFIGS[name], kl_coefficient=0.0), world)
    assert reported["ratio_token_mean"] == 1.0
    assert reported["clipped_low_fraction"] == reported["clipped_high_fraction"] == 0.0
    assert reported["update_kl_token_mean"] == 0.0
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_without_weight_count_nowhere(name):
    world = rollouts()
    world["loss_weights"][1::2] = 0
    fewer = {key: array[::2] for key, array in world.items()}
    value, gradient, _ = ours(CONFIGS[name], world)
    alone, gradient_alone, _ = ours(CONFIGS[name], fewer)
    assert value == pytest.approx(alone, rel=1e-6)
    assert np.abs(gradient[::2] - gradient_alone).max() <= 1e-6 * np.abs(gradient_alone).max()
    assert not gradient[1::2].any()


def test_what_stands_in_the_padding_changes_nothing():
    world = rollouts()
    outside = world["loss_weights"] == 0
    assert outside.any()
    loud = {key: np.where(outside, 1e3, world[key]) for key in ("old_logp", "reference_logp", "rollout_logp")}
    quiet = {key: np.where(outside, -1e3, world[key]) for key in loud}
    a, b = ours(CONFIG, world | loud), ours(CONFIG, world | quiet)
    assert a[0] == b[0] and np.isfinite(a[1]).all() and (a[1] == b[1]).all()


@pytest.mark.parametrize(("scale", "ddof"), [("std", 0), ("std", 1), ("none", 1)])
def test_advantages_are_those_of_the_formula(scale, ddof):
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    rewards[2] = 0.1  # the mean of equal numbers may be another one in the last bit
    found = advantages(rewards, AdvantageConfig(scale, ddof, 1e-4))
    for group, row in zip(rewards, found, strict=True):
        mean = sum(group) / 4
        variance = sum((value - mean) ** 2 for value in group) / (4 - ddof)
        for value, advantage in zip(group, row, strict=True):
            expected = (value - mean) / (variance**0.5 + 1e-4 if scale == "std" else 1.0)
            assert advantage == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert not found[2].any() and spread(rewards).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clip_low": 0.0}, "clip_low=0 should be above 0"),
        ({"aggregation": "tokens"}, "did you mean 'token'"),
        ({"constant": 5}, "should be the tokens"),
        ({"aggregation": "constant"}, "should be the tokens"),
        ({"temperature": 0.0}, "temperature=0 should be above 0"),
        ({"kl_coefficient": -1.0}, "should not be negative"),
        ({"kl_coefficient": 0.0}, "none is read at a coefficient of 0"),
        ({"reference": "none"}, "a divergence needs a reference"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, text):
    with pytest.raises(UsageError, match=text):
        dataclasses.replace(CONFIG, **change).check("config.objective.grpo")
