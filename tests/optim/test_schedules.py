"""Schedules: against transformers and torch, and what each step uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import optimization

from t5x_like.core.errors import UsageError
from t5x_like.optim.schedules import SCHEDULES, build_schedule

PEAK, STEPS = 3e-3, 20


def ours(config, changes: dict, steps: int = STEPS) -> list[float]:
    schedule = build_schedule(
        config({f"schedule.{k}": v for k, v in changes.items()}).schedule, peak=PEAK, total_steps=steps
    )
    return [float(schedule(step)) for step in range(steps)]


def rates_of_torch(make, steps: int = STEPS) -> list[float]:
    """Learning rates that `steps` updates of torch use, of which we skip the first: it is 0 under a warmup."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0
    return rates[1:]


CASES = {
    "constant": ({}, lambda o: optimization.get_constant_schedule_with_warmup(o, 4)),
    "cosine": (
        {"cosine.final_fraction": 0.1},
        lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, 4, STEPS, min_lr_rate=0.1),
    ),
    "linear": ({"linear.final_fraction": 0.0}, lambda o: optimization.get_linear_schedule_with_warmup(o, 4, STEPS)),
    "rsqrt": ({"rsqrt.timescale": None}, lambda o: optimization.get_inverse_sqrt_schedule(o, 4)),
    "wsd linear": (
        {"warmup_stable_decay.shape": "linear", "warmup_stable_decay.decay_fraction": 0.4},
        lambda o: optimization.get_wsd_schedule(o, 4, 8, STEPS, decay_type="linear"),
    ),
    "wsd cosine": (
        {"warmup_stable_decay.shape": "cosine", "warmup_stable_decay.decay_fraction": 0.4},
        lambda o: optimization.get_wsd_schedule(o, 4, 8, STEPS, decay_type="cosine"),
    ),
    "wsd sqrt": (
        {"warmup_stable_decay.shape": "sqrt", "warmup_stable_decay.decay_fraction": 0.4},
        lambda o: optimization.get_wsd_schedule(o, 4, 8, STEPS, decay_type="1-sqrt"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_schedule_equals_transformers_one_step_later(config, case):
    changes, theirs = CASES[case]
    name = "warmup_stable_decay" if case.startswith("wsd") else case
    rates = ours(config, {"name": name, "warmup_steps": 4, **changes})
    np.testing.assert_allclose(rates, rates_of_torch(theirs), rtol=1e-6, atol=1e-7 * PEAK)
    assert len(set(rates)) >= 4


def test_every_schedule_is_compared():
    assert {"warmup_stable_decay" if case.startswith("wsd") else case for case in CASES} == set(SCHEDULES)


def test_cosine_to_zero_equals_torch_cosine_annealing(config):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    theirs = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    rates = ours(config, {"name": "cosine", "cosine.final_fraction": 0.0})
    np.testing.assert_allclose(rates, theirs, rtol=1e-6, atol=1e-7 * PEAK)


def test_rsqrt_without_warmup_is_the_one_of_t5(config):
    """Raffel et al.: 1 / sqrt(max(n, k)), here times sqrt(k)."""
    rates = ours(config, {"name": "rsqrt", "rsqrt.timescale": 5})
    expected = [PEAK * np.sqrt(5) / np.sqrt(max(step + 1, 5)) for step in range(STEPS)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert rates[0] == rates[4] > rates[5]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_starts_above_zero_and_reaches_the_peak(config, name):
    rates = ours(config, {"name": name, "warmup_steps": 4})
    np.testing.assert_allclose(rates[:4], [PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK], rtol=1e-6)
    assert max(rates) == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_a_run_of_warmup_alone_ends_at_the_peak(config, name):
    assert ours(config, {"name": name, "warmup_steps": STEPS})[-1] == pytest.approx(PEAK)


@pytest.mark.parametrize("name", SCHEDULES)
def test_jit_and_host_agree(config, name):
    section = config({"schedule.name": name, "schedule.warmup_steps": 3}).schedule
    schedule = build_schedule(section, peak=PEAK, total_steps=STEPS)
    steps = jnp.arange(STEPS + 5, dtype=jnp.int32)
    traced = jax.jit(jax.vmap(schedule))(steps)
    np.testing.assert_allclose(traced, [schedule(step) for step in range(STEPS + 5)], rtol=1e-6, atol=1e-12)
    assert traced.dtype == jnp.float32


@pytest.mark.parametrize("name", ["cosine", "linear", "warmup_stable_decay"])
def test_last_step_and_beyond_use_the_final_fraction(config, name):
    section = config({"schedule.name": name, f"schedule.{name}.final_fraction": 0.25}).schedule
    schedule = build_schedule(section, peak=PEAK, total_steps=STEPS)
    assert float(schedule(STEPS - 2)) > 0.252 * PEAK
    for step in (STEPS - 1, STEPS, 10 * STEPS):
        assert float(schedule(step)) == pytest.approx(0.25 * PEAK, rel=1e-6)


def test_the_end_of_a_long_run_is_exact(config):
    """One step before the end of 1e6, linear decay is 1e-6 of the peak, not that plus rounding of 1 - progress."""
    section = config({"schedule.name": "linear"}).schedule
    schedule = build_schedule(section, peak=1.0, total_steps=1_000_000)
    assert float(schedule(999_998)) == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cosin"}, "config.optim.schedule.name='cosin' is unknown"),
        ({"name": "cosine", "warmup_steps": 21}, "warmup_steps=21 exceeds the 20 steps of the run; lower it"),
        ({"name": "constant", "warmup_steps": -1}, "warmup_steps=-1 should be at least 0"),
        ({"name": "linear", "linear.final_fraction": 1.5}, "linear.final_fraction=1.5 should be a fraction"),
        ({"name": "rsqrt"}, "rsqrt.timescale=0 should be at least 1"),
        ({"name": "warmup_stable_decay", "warmup_steps": 17}, "17 steps of warmup and 4 of decay exceed the 20 of the"),
        (
            {"name": "warmup_stable_decay", "warmup_stable_decay.shape": "cube"},
            "shape='cube' is unknown; known: linear",
        ),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(config, changes, message):
    with pytest.raises(UsageError) as error:
        ours(config, changes)
    assert message in str(error.value) and "\n" not in str(error.value)
