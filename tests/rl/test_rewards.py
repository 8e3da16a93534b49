"""Verifiers and the process that runs them: what they give, and what becomes of those that raise, hang or end it."""

import dataclasses
import pathlib
import signal
import time

import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.rl import verifiers
from t5x_like.rl.config import AdvantageConfig, RewardConfig, RlConfig
from t5x_like.rl.rewards import Rewards, Sample
from tests.rl import judges

PART = RewardConfig("exact", 1.0, "", None)
CONFIG = RlConfig(
    prompts=2,
    samples=2,
    answers_per_row=1,
    epochs=1,
    new_tokens=4,
    rows=0,
    weights="gathered",
    end_tokens=("eos",),
    truncated="keep",
    generate=None,
    held_out=0,
    advantage=AdvantageConfig("std", 1, 1e-4),
    rewards={"exact": PART},
    reward_seconds=2.0,
    failure_value=-1.0,
)


def quiet():
    pass


def config(**parts: RewardConfig) -> RlConfig:
    return dataclasses.replace(CONFIG, rewards=parts)


def function(chosen) -> tuple[RewardConfig, dict]:
    name, place = verifiers.named(chosen)
    return RewardConfig("function", 1.0, "", name), {name: place}


def test_parts_are_judged_each_by_itself_and_summed_by_weight():
    part, places = function(judges.length)
    regex = RewardConfig("regex", 0.5, r"= (?P<answer>\d+)", None)
    parts = config(exact=PART, regex=regex, length=dataclasses.replace(part, weight=0.25))
    samples = [Sample("1+1", "= 2", "2"), Sample("1+1", " 2 ", "2"), Sample("3", "= 4", "5")]
    with Rewards(parts, places, warn=pytest.fail) as rewards:
        judged = rewards.judge(samples, where="test", progress=quiet)
    assert judged.values.tolist() == [[0, 1, 0], [1, 0, 0], [3, 3, 3]]
    assert rewards.total(judged.values).tolist() == [0.5 + 0.75, 1 + 0.75, 0.75]
    assert not judged.failed.any()


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        (judges.raises, "raised ZeroDivisionError: division by zero"),
        (judges.leaves, "ended its process"),
        (judges.infinite, "returned inf"),
        (judges.no_number, "raised TypeError"),
        (judges.beyond_float32, "returned 1e+39, which float32 does not hold"),
        (judges.greedy, "raised MemoryError"),
    ],
)
def test_one_that_fails_for_an_answer_costs_that_answer_alone(chosen, problem):
    part, places = function(chosen)
    said: list[str] = []
    samples = [Sample("p", "good", ""), Sample("the prompt", "bad", ""), Sample("p", "good", "")]
    with Rewards(config(own=part), places, warn=said.append) as rewards:
        judged = rewards.judge(samples, where="iteration 7", progress=quiet)
    assert judged.values.tolist() == [[1, -1, 1]] and judged.failed.tolist() == [[0, 1, 0]]
    assert len(said) == 1
    for text in ("iteration 7: config.rl.rewards.own", problem, "'bad'", "'the prompt'", "its value is -1"):
        assert text in said[0]


@pytest.mark.parametrize("chosen", [judges.sleeps, judges.hopeless_pattern])
def test_one_that_hangs_is_ended_at_its_limit_even_within_c(chosen):
    part, places = function(chosen)
    said: list[str] = []
    samples = [Sample("p", "bad", ""), Sample("p", "good", "")]
    begun = time.monotonic()
    with Rewards(config(own=part), places, warn=said.append) as rewards:
        judged = rewards.judge(samples, where="test", progress=quiet)
    assert judged.values.tolist() == [[-1, 1]]
    assert time.monotonic() - begun < 20
    assert "took longer than 2 s (config.rl.reward_seconds)" in said[0]


def test_each_answer_is_progress_and_failures_are_said_a_few_times_and_counted():
    """A watch that looks for progress sees it also where every answer takes its whole time."""
    part, places = function(judges.raises)
    said: list[str] = []
    seen: list[int] = []
    samples = [Sample("p", "bad" if index % 5 else "good", "") for index in range(10)]
    with Rewards(config(own=part), places, warn=said.append) as rewards:
        judged = rewards.judge(samples, where="iteration 7", progress=lambda: seen.append(len(said)))
    assert len(seen) == 10 and judged.failed.sum() == 8
    assert len(said) == 4 and said[-1] == (
        "iteration 7: config.rl.rewards.own failed for 8 of 10 answers, of which the first 3 are named"
    )


@pytest.mark.parametrize("chosen", [judges.hangs_in_a_child, judges.leaves_a_child])
def test_what_a_verifier_started_ends_with_it(chosen, tmp_path):
    part, places = function(chosen)
    said: list[str] = []
    with Rewards(config(own=part), places, warn=said.append) as rewards:
        rewards.judge([Sample(str(tmp_path / "child"), "bad", "")], where="test", progress=quiet)
        child = int((tmp_path / "child").read_text())
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def alive(process: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_signal_to_all_processes_of_a_job_does_not_end_the_judge():
    part, places = function(judges.length)
    with Rewards(config(length=part), places, warn=pytest.fail) as rewards:
        first = rewards.judge([Sample("", "abc", "")], where="test", progress=quiet)
        assert rewards._worker is not None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            rewards._worker._process.send_signal(number)
        second = rewards.judge([Sample("", "abc", "")], where="test", progress=quiet)
    assert first.values.tolist() == second.values.tolist() == [[3]] and not second.failed.any()


def test_a_number_may_have_a_power_of_ten():
    for text, value in {
        "1e5": 100000,
        "so 2.5E-1.": 0.25,
        "1e5x": 5,
        "3 eggs": 3,
        "1,000e3": 10**6,
        "1/4": 0.25,
    }.items():
        assert verifiers.last_number(text) == value, text


def test_what_a_function_prints_does_not_disturb():
    part, places = function(judges.prints)
    with Rewards(config(own=part), places, warn=pytest.fail) as rewards:
        assert rewards.judge([Sample("p", "a", "")], where="test", progress=quiet).values.tolist() == [[1]]


def test_a_file_that_cannot_be_run_in_the_worker_is_one_line():
    part, places = function(judges.length)
    missing = {name: dataclasses.replace(place, name="nowhere") for name, place in places.items()}
    with pytest.raises(UserError, match=r"config\.rl\.rewards\.own: AttributeError"):
        with Rewards(config(own=part), missing, warn=pytest.fail):
            pass


def test_a_function_that_no_process_finds_again_is_refused():
    with pytest.raises(ValueError, match="top level"):
        verifiers.named(lambda prompt, answer, expected: 1.0)


def test_the_name_of_a_function_changes_with_its_source():
    assert verifiers.named(judges.length)[0] != verifiers.named(judges.prints)[0].replace("prints", "length")
    assert verifiers.named(judges.length)[0].startswith("judges.py:length@")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "exakt"}, "did you mean 'exact'"),
        ({"pattern": "x"}, "belongs to kind='regex'"),
        ({"kind": "regex", "pattern": "("}, "is no regular expression"),
        ({"kind": "function"}, "belongs to kind='function'"),
    ],
)
def test_parts_that_cannot_work_are_refused(change, text):
    with pytest.raises(UsageError, match=text):
        dataclasses.replace(PART, **change).check("config.rl.rewards.x")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"samples": 1}, "should be at least 2"),
        ({"rewards": {}}, "rewards is empty"),
        ({"rows": 3}, "does not divide"),
        ({"truncated": "drop"}, "is unknown"),
        ({"end_tokens": ()}, "end_tokens is empty"),
        ({"reward_seconds": 0.0}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, text):
    with pytest.raises(UsageError, match=text):
        dataclasses.replace(CONFIG, **change).check("config.rl")
