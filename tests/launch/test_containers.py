"""A JobSet as a cluster would run it: what follows from each exit status, who is who, and a run of four processes of
two slices, one of which is killed, one asked to stop, that ends with the losses of an undisturbed one."""

import json
import os
import signal
import time

import pytest
from jax._src.clusters import cloud_tpu_cluster

from launch import gke
from t5x_like.storage import model_directory, paths
from tests.launch import cluster, jobs
from tests.storage.fake_gcs import fake_gcs  # noqa: F401

POD = cluster.Pod(1, 0)
COUNTED, NOT_COUNTED, ENDS = "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"


def follows(document, status, *, disrupted=False):
    return cluster.action(document, *cluster.job_failure(document, POD, status, disrupted=disrupted))


@pytest.mark.parametrize(
    ("status", "disrupted", "wanted"),
    [
        (75, False, NOT_COUNTED),  # asked to stop, and saved
        (75, True, NOT_COUNTED),
        (137, True, NOT_COUNTED),  # the machine went without a word
        (2, False, ENDS),
        (1, False, COUNTED),
        (137, False, COUNTED),  # out of memory, say
        (134, False, COUNTED),  # jax lost a peer
        (143, False, COUNTED),
        (20, False, COUNTED),
        (22, False, COUNTED),
        (175, False, COUNTED),
    ],
)
def test_each_exit_status_does_what_is_said(status, disrupted, wanted):
    assert follows(gke.manifest(jobs.job(slices=2)), status, disrupted=disrupted) == wanted


def test_through_xpk_2_ends_the_set_and_75_is_a_restart_like_any_other():
    document = jobs.of_xpk("v5p_two_slices")
    assert [follows(document, status) for status in (2, 1, 75, 137, 143)] == [ENDS, *[COUNTED] * 4]


def test_jax_finds_its_place_in_the_environment_of_every_pod(monkeypatch):
    document = gke.manifest(jobs.job(topology="v6e:2x4", slices=3))
    places = []
    for pod in cluster.pods(document):
        for name, value in cluster.environment(document, pod, port=7777).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        of_gke = cloud_tpu_cluster.GkeTpuCluster
        assert of_gke.is_env_present() and not cloud_tpu_cluster.GceTpuCluster.is_env_present()
        assert of_gke.get_coordinator_address(5, "7777") == "127.0.0.1:7777"
        assert of_gke.get_process_count() == 6
        places.append(of_gke.get_process_id())
    assert places == list(range(6))


STEPS = 40
CONFIG = (
    "--config.checkpoint.every_steps=5",
    "--config.evaluate.every_steps=20",
    f"--config.loop.steps={STEPS}",
    "--config.model.decoder.layers=1",
    "--config.mesh.preset=fsdp",
    "--config.mesh.slice=2",
    "--config.runtime.heartbeat_seconds=15",
    "--config.runtime.threads=1",
    "--config.telemetry.tensorboard=False",
)


def rows(workdir):
    """{step: loss} of the run so far."""
    path = f"{workdir}/metrics.jsonl"
    if not paths.exists(path):
        return {}
    found = [json.loads(line) for line in paths.read_text(path).splitlines()]
    return {row["step"]: row["train/loss"] for row in found if "train/loss" in row}


def committed(workdir):
    return model_directory.committed_steps(f"{workdir}/checkpoints")


def wait_for(condition, attempt, *, seconds=600):
    """Until it holds, or a pod has ended; compiling alone may take minutes where the machine is busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(child.poll() is not None for child in attempt.children):
            return
        time.sleep(0.05)


def launched(name, bucket, *config):
    values = {"workdir": f"{bucket}/runs/{name}", "topology": "v6e:2x4", "slices": 2, "max_restarts": 1}
    return jobs.job(*CONFIG, *config, file="--config=configs/pretrain/test.py", **values)


@pytest.fixture
def given(fake_gcs):  # noqa: F811
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.slow
@pytest.mark.xdist_group("gcs")
def test_one_pod_is_killed_one_is_asked_to_stop_and_the_losses_are_the_undisturbed_ones(fake_gcs, given):  # noqa: F811
    bucket = fake_gcs.bucket()
    disturbed, undisturbed = launched("disturbed", bucket), launched("undisturbed", bucket)
    at = []

    def disturb(number, attempt):
        workdir, victim = disturbed.workdir, attempt.children[3]
        if number == 0:  # its machine is lost
            wait_for(lambda: max(committed(workdir), default=0) >= 5, attempt)
            at.append(max(rows(workdir), default=0))
            os.kill(victim.pid, signal.SIGKILL)
        if number == 1:  # its machine is wanted back
            wait_for(lambda: max(committed(workdir), default=0) >= 15, attempt)
            at.append(max(rows(workdir), default=0))
            victim.send_signal(signal.SIGTERM)

    outcome = cluster.run(gke.manifest(disturbed), given, module="tests.launch.tpu_host", disturb=disturb)
    said = "\n\n".join(outcome.attempts)
    assert outcome.done, said
    assert outcome.actions == [COUNTED, NOT_COUNTED], said
    assert len(at) == 2 and 5 <= at[0] < at[1] < STEPS, at

    quiet = cluster.run(
        gke.manifest(undisturbed), given, module="tests.launch.tpu_host", disturb=lambda number, attempt: None
    )
    assert quiet.done and quiet.actions == []
    found, expected = rows(disturbed.workdir), rows(undisturbed.workdir)
    assert list(found) == list(range(1, STEPS + 1)) and len(set(found.values())) > 30
    assert found == expected
    starts = paths.read_json(f"{disturbed.workdir}/manifest.json")["starts"]
    assert len(starts) == 3 and {start["processes"] for start in starts} == {4}
    assert starts[1]["resumed_from"] >= 5 and starts[2]["resumed_from"] >= 15


@pytest.mark.slow
@pytest.mark.xdist_group("gcs")
def test_wrong_use_ends_the_set_at_once(fake_gcs, given):  # noqa: F811
    job = launched("wrong", fake_gcs.bucket(), "--config.data.batch_size=6")
    outcome = cluster.run(
        gke.manifest(job), given, module="tests.launch.tpu_host", disturb=lambda number, attempt: None
    )
    assert (outcome.done, outcome.actions) == (False, [ENDS]), outcome.attempts
    assert "config.data.batch_size=6 is not divisible by the 4 data shards" in outcome.attempts[0]
