"""Two processes of 4 fake devices learn by rewards what one process of 8 learns, and one goes on where both stopped.

Answers are drawn by keys of (seed, iteration, prompt, sample) and judged by process 0, so that they are the same; what
is computed of them is as near as in training (test_two_processes.py).
"""

import os
import signal

import pytest

from t5x_like.__main__ import main
from tests.end_to_end.commands import ROOT
from tests.end_to_end.launches import Launch, differences, losses

STEPS = 4  # updates until both are stopped: two iterations of 2 updates, 16 answers each
AFTER = 6  # updates after the resume
TOLERANCE_AT_FIRST, TOLERANCE = 1e-6, 2e-5
CONFIG = (
    "--config=configs/rl/test.py",
    "--config.mesh.preset=fsdp",
    "--config.evaluate.every_steps=0",
    "--config.checkpoint.every_steps=3",
    "--config.telemetry.tensorboard=False",
    "--config.runtime.heartbeat_seconds=30",
    "--config.optim.schedule.name=constant",
    "--config.optim.learning_rate=0.001",
)


@pytest.fixture(autouse=True, scope="module")
def _in_the_project():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Launch:
    """Two processes that share answers and updates, asked to stop on the way; then one process goes on."""
    launch = Launch(tmp_path_factory.mktemp("two"), *CONFIG, "--config.loop.steps=3000", command="rl")
    launch.wait_for_step(STEPS)
    launch.child.send_signal(signal.SIGTERM)
    launch.status = launch.finish()
    launch.losses = losses(launch.workdir, "train/grad_norm")
    launch.saved = os.listdir(launch.workdir / "checkpoints")
    last = max(launch.losses)
    launch.resumed = main(["rl", f"--workdir={launch.workdir}", *CONFIG, f"--config.loop.steps={last + AFTER}"])
    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory, stopped):
    """The workdir of the undisturbed run: one process, 8 devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    steps = max(stopped.losses) + AFTER
    assert main(["rl", f"--workdir={workdir}", *CONFIG, f"--config.loop.steps={steps}"]) == 0
    return workdir


def test_two_processes_give_the_answers_and_updates_of_one(stopped, alone):
    assert (stopped.status, stopped.resumed) == (75, 0), stopped.output
    for name in ("reward", "reward/share", "length_mean", "stopped_by_length", "groups_without_spread"):
        found, expected = (losses(workdir, f"train/{name}") for workdir in (stopped.workdir, alone))
        assert found == expected and len(found) == max(stopped.losses) + AFTER, name
    rewards = losses(alone, "train/reward")
    assert len(set(rewards.values())) > 1, "iterations have other answers"
    found = differences(stopped.losses, losses(alone, "train/grad_norm"))
    assert max(found[:STEPS]) <= TOLERANCE_AT_FIRST
    assert max(found) <= TOLERANCE


def test_one_process_goes_on_with_the_answers_that_two_had_drawn(stopped, alone):
    """The checkpoint holds them, and what it is read onto is another number of processes."""
    assert stopped.saved and str(max(stopped.losses)) in stopped.saved
    found = differences(losses(stopped.workdir, "train/grad_norm"), losses(alone, "train/grad_norm"))
    assert len(found) == max(stopped.losses) + AFTER and max(found) <= TOLERANCE
    ratios = losses(stopped.workdir, "train/ratio_token_mean")
    assert [step for step, ratio in ratios.items() if ratio == 1.0] == [
        step for step, ratio in losses(alone, "train/ratio_token_mean").items() if ratio == 1.0
    ]
