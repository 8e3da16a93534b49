"""The order of the training loop and what each save is told, with a step that only counts."""

import contextlib
import types

import numpy as np
import pytest

from t5x_like.training import loop as loops
from t5x_like.training.evaluate import EvaluateConfig, evaluate
from t5x_like.training.keep import CheckpointConfig

CHECKPOINT = CheckpointConfig(4, True, 60, 2, None, "eval/validation/loss", "min", 1, None, (".*",), "model", None)
LOOP = loops.LoopConfig(8, 1, 1, None, "stop", "off", 6.0, 0.99, 100)
FINE = {"loss": 1.0, "grad_norm": 1.0, "finite": 1.0, "spike": 0.0, "skipped": 0.0}


def run(*, start: int = 0, evaluation=None, stop_at: int | None = None, interrupted: bool = False):
    """(outcome, what happened in order): a save is ("save", step, the evaluation it was given)."""
    seen: list[tuple] = []
    here = contextlib.nullcontext()
    telemetry = types.SimpleNamespace(
        timed=lambda name: here,
        flush=lambda step, last: seen.append(("flush", step)),
        before_step=lambda step: None,
        log_step=lambda step, metrics, write: seen.append(("row", step)),
        log_evaluation=lambda step, name, values: seen.append(("evaluate", step)),
    )
    faults = types.SimpleNamespace(
        should_stop=lambda step: step == stop_at,
        interrupted=lambda: interrupted,
        phase=lambda name: here,
        enter=lambda name: None,
    )
    saver = types.SimpleNamespace(
        save=lambda step, state, frozen, evaluation: seen.append(("save", step, evaluation)),
        judge=lambda step, evaluation: seen.append(("judge", step, evaluation)),
        wait=lambda: None,
    )

    def batch_at(index):
        seen.append(("batch", index))
        return {}

    loop = loops.Loop(
        config=LOOP,
        evaluate_config=EvaluateConfig(every_steps=4, ema=False),
        checkpoint_config=CHECKPOINT,
        step=lambda state, frozen, batch: (state, FINE),
        evaluate=lambda params, frozen, batch: {"loss": (np.float32(2), np.float32(1))},
        source=loops.Prepared(batch_at),
        held_out={"validation": [{}]},
        saver=saver,  # type: ignore[arg-type]
        telemetry=telemetry,  # type: ignore[arg-type]
        faults=faults,  # type: ignore[arg-type]
    )
    return loops.train(loop, {"params": {}}, {}, start=start, evaluation=evaluation or {}), seen


def test_rows_and_evaluation_stand_before_the_save_and_the_next_batch_after_it():
    _, seen = run()
    names = [(name, step) for name, step, *_ in seen]
    at = names.index(("save", 4))
    assert names[at - 3 : at + 2] == [("row", 4), ("evaluate", 4), ("flush", 4), ("save", 4), ("batch", 4)]
    assert names[-1] == ("save", 8)


def test_a_save_holds_the_evaluation_of_its_own_step_or_none():
    outcome, seen = run(stop_at=6)
    saves = {step: evaluation for name, step, *rest in seen if name == "save" for evaluation in rest}
    assert saves.keys() == {4, 6} and saves[4]["eval/validation/loss"] == 2.0
    assert saves[6] == {} and not outcome.finished


def test_an_evaluation_that_was_made_is_not_repeated_at_the_resume():
    _, seen = run(start=4, evaluation={"eval/validation/loss": 2.0})
    assert [(name, step) for name, step, *_ in seen][:2] == [("batch", 4), ("batch", 5)]


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("interrupted", [False, True])
def test_who_is_asked_to_stop_saves_at_once_and_evaluates_at_the_resume(step, interrupted):
    """Whether the signal comes before the evaluation that is due or in the midst of it."""
    outcome, seen = run(interrupted=True) if interrupted else run(stop_at=step)
    step = 4 if interrupted else step
    assert not outcome.finished and seen[-1] == ("save", step, {})
    assert ("evaluate", step) not in seen
    outcome, seen = run(start=step)
    assert seen[0] == ("evaluate", step) and seen[1] == ("judge", step, outcome.evaluation)
    assert ("save", step) not in [(name, at) for name, at, *_ in seen]
    assert outcome.finished and outcome.evaluation["eval/validation/loss"] == 2.0


def test_a_run_that_was_killed_after_its_last_save_still_knows_its_evaluation():
    outcome, seen = run(start=8, evaluation={"eval/validation/loss": 3.0})
    assert seen == [] and outcome.finished and outcome.evaluation == {"eval/validation/loss": 3.0}


def test_perplexity_is_the_exponential_of_the_loss_wherever_that_is_a_number():
    def of(loss):
        sums = {"loss": (np.float32(loss), np.float32(1)), "bits_per_byte": (np.float32(loss), np.float32(1))}
        values = evaluate(lambda *_: sums, {}, {}, [{}], stop=lambda: False)
        assert values is not None
        return values["perplexity"]

    assert of(2.0) == np.exp(2.0) and of(1e4) == np.inf and np.isnan(of(np.nan))


def test_a_value_of_which_there_is_nothing_is_left_out():
    sums = {"loss": (np.float32(3), np.float32(2)), "bits_per_byte": (np.float32(3), np.float32(0))}
    values = evaluate(lambda *_: sums, {}, {}, [{}], stop=lambda: False)
    assert values is not None and values.keys() == {"loss", "perplexity"}
