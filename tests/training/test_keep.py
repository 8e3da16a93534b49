"""Which checkpoints are kept: the newest two always, the best besides, and configs that could not work are refused."""

import dataclasses
import itertools
import random

import pytest

from t5x_like.core.errors import UsageError
from t5x_like.training.keep import CheckpointConfig, best_steps, check_best_metric, is_due, steps_to_keep

CONFIG = CheckpointConfig(
    every_steps=10,
    asynchronous=True,
    timeout_seconds=600,
    keep_last=2,
    keep_every=None,
    best_metric=None,
    best_mode="min",
    keep_best=1,
    init_from=None,
    init_select=(".*",),
    holds="model",
    branch_from=None,
)


def _config(**changes) -> CheckpointConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_the_last_n_are_kept():
    steps = [10, 20, 30, 40, 50]
    assert steps_to_keep(steps, {}, config=_config(keep_last=3)) == {30, 40, 50}
    assert steps_to_keep(list(reversed(steps)), {}, config=_config(keep_last=3)) == {30, 40, 50}
    assert steps_to_keep([10], {}, config=CONFIG) == {10}
    assert steps_to_keep([], {}, config=CONFIG) == set()


def test_every_kth_is_kept_for_ever():
    steps = range(10, 101, 10)
    assert steps_to_keep(steps, {}, config=_config(keep_every=40)) == {40, 80, 90, 100}


def test_the_best_is_kept_besides_the_newest_two():
    """The case in which Orbax's own retention kept 3 and 4 and deleted 5 and 6."""
    metrics = {
        1: {"loss": 5.0},
        2: {"loss": 4.0},
        3: {"loss": 1.0},
        4: {"loss": 2.0},
        5: {"loss": 3.0},
        6: {"loss": 9.0},
    }
    config = _config(best_metric="loss", keep_best=2)
    assert steps_to_keep(range(1, 7), metrics, config=config) == {3, 4, 5, 6}
    assert steps_to_keep(range(1, 7), metrics, config=_config(best_metric="loss", best_mode="max")) == {5, 6}


def test_no_metric_is_neither_best_nor_worst():
    metrics = {1: {"loss": 2.0}, 2: {"other": 0.0}, 3: {"loss": float("nan")}, 4: {"loss": float("-inf")}}
    assert best_steps([1, 2, 3, 4, 5], metrics, config=_config(best_metric="loss")) == [1]


def test_of_equal_ones_the_newer_is_better():
    metrics = {step: {"loss": 1.0} for step in range(5)}
    assert best_steps(range(5), metrics, config=_config(best_metric="loss")) == [4, 3, 2, 1, 0]


def test_deleting_as_they_come_never_loses_the_newest_two_or_the_best():
    chance = random.Random(0)
    for keep_last, keep_every, mode in itertools.product((2, 3), (None, 7), ("min", "max")):
        config = _config(keep_last=keep_last, keep_every=keep_every, best_metric="loss", best_mode=mode)
        there: list[int] = []
        metrics: dict[int, dict[str, float]] = {}
        for step in range(1, 60):
            there.append(step)
            metrics[step] = {"loss": chance.random()}
            there = sorted(steps_to_keep(there, metrics, config=config))
            pick = min if mode == "min" else max
            assert pick(metrics, key=lambda known: metrics[known]["loss"]) in there
            assert set(range(max(1, step - keep_last + 1), step + 1)) <= set(there)
            assert all(known in there for known in range(7, step, 7)) or keep_every is None


def test_a_checkpoint_is_due_at_its_interval_and_at_the_end():
    assert [step for step in range(26) if is_due(step, config=CONFIG, last_step=25)] == [10, 20, 25]


@pytest.mark.parametrize(
    ("changes", "evaluate_every", "message"),
    [
        ({"keep_last": 1}, 10, "keep_last=1 should be at least 2"),
        ({"every_steps": 0}, 10, "every_steps=0 should be at least 1"),
        ({"keep_every": 0}, 10, "keep_every=0 should be at least 1, or None"),
        ({"best_mode": "best"}, 10, "best_mode='best' should be 'min' or 'max'"),
        ({"best_metric": "eval/v/loss"}, 4, "every_steps=10 should be a multiple of config.evaluate.every_steps=4"),
        ({"best_metric": "eval/v/loss"}, None, "needs evaluations; set config.evaluate.every_steps"),
        ({"best_metric": "eval/v/loss"}, 0, "needs evaluations; set config.evaluate.every_steps"),
    ],
)
def test_what_could_not_work_is_refused(changes, evaluate_every, message):
    _check(CONFIG, 5)
    with pytest.raises(UsageError, match=message):
        _check(_config(**changes), evaluate_every)


def _check(config, evaluate_every):
    config.check("config.checkpoint")
    check_best_metric(config, evaluate_every_steps=evaluate_every)
