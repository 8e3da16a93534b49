"""Two processes on a real Slurm train, are requeued in the middle, and end with the losses of an undisturbed run."""

import pathlib

import pytest

from launch.slurm import main as launch
from t5x_like.__main__ import main
from tests.end_to_end.launches import differences, losses
from tests.end_to_end.test_two_processes import BASE, FSDP, TOLERANCE
from tests.launch.slurm_cluster import cluster, missing

STEPS, MIDDLE = 80, 12
RUN = (*BASE, *FSDP, f"--config.loop.steps={STEPS}")


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
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "JAX_CHECK_PROXY_ENVS": "false"}
        flags = [f"--environment={name}={value}" for name, value in environment.items()]
        flags += [f"--workdir={workdir}", "--nodes=2", "--grace_seconds=60", "--no_check"]
        assert launch([*RUN, *flags, "--name=requeued"]) == 0
        number = slurm.run("squeue", "--noheader", "--name=requeued", "--format=%i").strip()
        slurm.until(lambda: len(losses(workdir)) >= MIDDLE, seconds=120)
        slurm.run("scontrol", "requeue", number)
        ended = slurm.finish(number, seconds=120)
    return ended, (folder / "run.log").read_text(), workdir


def test_it_was_requeued_once_and_is_done(requeued):
    ended, log, _ = requeued
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("launch: start ") == 2 and log.rstrip().endswith("launch: done"), log
    assert "SIGTERM: saves after this step and ends" in log, log


def test_its_losses_are_those_of_an_undisturbed_run(requeued, tmp_path):
    _, _, workdir = requeued
    assert main(["train", f"--workdir={tmp_path}/run", *RUN]) == 0
    found = losses(workdir)
    assert sorted(found) == list(range(1, STEPS + 1)), "every step once"
    assert max(differences(found, losses(tmp_path / "run"))) <= TOLERANCE
