"""Two real processes of 4 fake devices train what one process of 8 trains, and neither ever waits for a dead one.

The runs go through launch/local.py. What becomes of a peer that stops or raises is in tests/training/test_faults.py.
"""

import os
import re
import signal
import time

import pytest

from t5x_like.__main__ import main
from tests.end_to_end.launches import Launch, differences, losses

STEPS = 12  # until something is done to a run
AFTER = 10  # steps after a resume
# Sums over 8 devices in one process and over 2 x 4 through gloo are added in another order, and training carries
# the last bits on. Measured: 2e-7 (fsdp) and 3e-7 (tensor).
TOLERANCE_AT_FIRST, TOLERANCE = 1e-6, 2e-5
BASE = (
    "--config=configs/pretrain/test.py",
    "--config.evaluate.every_steps=6",
    "--config.checkpoint.every_steps=6",
    "--config.telemetry.tensorboard=False",
    "--config.runtime.heartbeat_seconds=30",
    # The same updates whatever the length of the run.
    "--config.optim.schedule.name=constant",
    "--config.optim.learning_rate=0.001",
    # 8 heads, so that they divide over a tensor axis that spans both processes.
    "--config.model.decoder.heads=8",
    "--config.model.decoder.kv_heads=8",
    "--config.model.decoder.head_size=4",
)
LONG = ("--config.loop.steps=3000",)
FSDP = ("--config.mesh.preset=fsdp",)
TENSOR = ("--config.mesh.preset=fsdp_tensor", "--config.mesh.fsdp=1", "--config.mesh.tensor=8")


@pytest.fixture(scope="module")
def preempted(tmp_path_factory) -> Launch:
    """Two processes that share the batch, asked to stop on the way; then one process goes on."""
    launch = Launch(tmp_path_factory.mktemp("preempted"), *BASE, *FSDP, *LONG)
    launch.wait_for_step(STEPS)
    launch.child.send_signal(signal.SIGTERM)
    launch.status = launch.finish()
    launch.losses = losses(launch.workdir)
    launch.saved = os.listdir(launch.workdir / "checkpoints")
    last = max(launch.losses)
    launch.resumed = main(["train", f"--workdir={launch.workdir}", f"--config.loop.steps={last + AFTER}"])
    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory, preempted) -> dict[int, float]:
    """The losses of the undisturbed run: one process, 8 devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    steps = max(preempted.losses) + AFTER
    assert main(["train", f"--workdir={workdir}", *BASE, *FSDP, f"--config.loop.steps={steps}"]) == 0
    return losses(workdir)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Launch:
    """Two processes that share every row, of which the second is killed."""
    launch = Launch(tmp_path_factory.mktemp("killed"), *BASE, *TENSOR, *LONG)
    launch.wait_for_step(STEPS)
    pids = re.search(r"process ids (\d+) (\d+)", launch.output)
    assert pids
    os.kill(int(pids.group(2)), signal.SIGKILL)
    begun = time.monotonic()
    launch.status = launch.finish()
    launch.seconds = time.monotonic() - begun
    return launch


def test_two_processes_give_the_losses_of_one(preempted, alone):
    found = differences(preempted.losses, alone)
    assert max(found[:STEPS]) <= TOLERANCE_AT_FIRST
    assert max(found) <= TOLERANCE


def test_a_tensor_axis_over_both_processes_gives_the_losses_of_one(killed, alone):
    found = differences(losses(killed.workdir), alone)
    assert max(found[:STEPS]) <= TOLERANCE_AT_FIRST


def test_data_shards_read_disjoint_rows_that_cover_the_batch(preempted):
    first, second = preempted.rows(0), preempted.rows(1)
    assert len(first.keys() & second.keys()) >= STEPS
    for step in first.keys() & second.keys():
        assert len(first[step]) == len(second[step]) == 4
        assert sorted(first[step] + second[step]) == list(range(8))


def test_processes_of_one_data_shard_read_the_same_rows(killed):
    first, second = killed.rows(0), killed.rows(1)
    assert len(first.keys() & second.keys()) >= STEPS
    for step in first.keys() & second.keys():
        assert first[step] == second[step] == list(range(8))


def test_a_signal_to_the_launcher_saves_on_both_and_ends_with_75(preempted):
    assert preempted.status == 75, preempted.output
    assert str(max(preempted.losses)) in preempted.saved


def test_one_process_goes_on_where_two_stopped(preempted, alone):
    assert preempted.resumed == 0
    resumed = losses(preempted.workdir)
    assert max(resumed) == max(preempted.losses) + AFTER
    after = {step: loss for step, loss in resumed.items() if step > max(preempted.losses)}
    assert max(differences(after, alone)) <= TOLERANCE


def test_a_killed_process_ends_the_run_with_one_line_that_names_it(killed):
    assert killed.status == 1
    assert killed.seconds < 30
    assert "launch: process 1 was ended by SIGKILL; the others have 20 s to end" in killed.output
    said = [line for line in killed.output.splitlines() if line.startswith("[0] t5x_like: ")]
    assert len(said) == 1 and "process 1 has given no heartbeat for 10.0 s" in said[0], killed.output
