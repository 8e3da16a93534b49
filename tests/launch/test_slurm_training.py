"""Two processes on a real Slurm train, are requeued in the middle, and end with the losses of an undisturbed run."""

import pathlib

import pytest

from launch.slurm import main as launch
from t5x_like.__main__ import main
from tests.end_to_end.launches import differences, losses
from tests.launch.slurm_cluster import cluster, missing

STEPS, MIDDLE = 48, 8
# Two processes of one device add in another order than one process of eight.
TOLERANCE = 2e-5
RUN = (
    "--config=configs/pretrain/test.py",
    f"--config.loop.steps={STEPS}",
    f"--config.evaluate.every_steps={STEPS}",
    f"--config.checkpoint.every_steps={STEPS}",
    "--config.telemetry.tensorboard=False",
    "--config.optim.learning_rate=0.001",
    "--config.mesh.preset=fsdp",
)
# Level 0, since process 1 has no compilation cache and compiles all at both starts.
PROCESSES = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture(scope="module")
def requeued(tmp_path_factory) -> tuple[dict[str, str], str, pathlib.Path]:
    """The job as Slurm has it at the end, its log and its workdir."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("requeued")
    workdir = folder / "run"
    with cluster(folder / "slurm") as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        flags = [f"--environment={name}={value}" for name, value in PROCESSES.items()]
        flags += [f"--workdir={workdir}", "--name=requeued", "--nodes=2", "--grace_seconds=60", "--no_check"]
        assert launch([*RUN, *flags]) == 0
        number = slurm.run("squeue", "--noheader", "--name=requeued", "--format=%i").strip()
        slurm.until(lambda: len(losses(workdir)) >= MIDDLE, seconds=200)
        slurm.run("scontrol", "requeue", number)
        ended = slurm.finish(number, seconds=200)
    return ended, (folder / "run.log").read_text(), workdir


def test_it_was_requeued_once_and_is_done(requeued):
    ended, log, _ = requeued
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("launch: start ") == 2 and log.rstrip().endswith("launch: done"), log
    assert "process 0: SIGTERM: saves after this step and ends" in log, log
    assert "begins with           checkpoint of step" in log and "2 x cpu in 2 processes" in log, log


def test_its_losses_are_those_of_an_undisturbed_run(requeued, tmp_path):
    _, _, workdir = requeued
    assert main(["train", f"--workdir={tmp_path}/run", *RUN]) == 0
    found = losses(workdir)
    assert sorted(found) == list(range(1, STEPS + 1)), "every step once"
    assert max(differences(found, losses(tmp_path / "run"))) <= TOLERANCE
