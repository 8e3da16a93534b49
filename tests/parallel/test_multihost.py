"""Processes find each other by flags or environment, share small values, and say in one line why they cannot join."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.parallel import multihost
from t5x_like.parallel.multihost import ALONE
from tests.training.faults_worker import CONFIG

ROOT = pathlib.Path(__file__).parents[2]

PAIR = """
import sys
from t5x_like.core import environment
from tests.training.faults_worker import CONFIG
environment.apply(CONFIG)
from t5x_like.core.errors import UserError
from t5x_like.parallel import multihost

processes = multihost.start(CONFIG)
assert multihost.start(CONFIG).count == 2, "a second start changes nothing"
import jax
assert (processes.index, processes.count) == (jax.process_index(), jax.process_count())
assert processes.primary == (processes.index == 0)
out = open(sys.argv[1], "w")
print(processes.broadcast("plan", {"steps": [processes.index + 7]}), file=out)
print(processes.gather("threads", processes.index), file=out)
print(processes.agree("seed", 3), file=out)
store = processes.store
if processes.primary:
    print(store.set("once", "a"), store.set("once", "b"), store.get("once"), file=out)
    often = [store.set("often", value, overwrite=True) for value in "ab"]
    print(*often, store.get("often"), file=out)
    print(store.folder("gather/threads"), file=out)
    try:
        store.get("never", timeout=0.2)
    except TimeoutError as error:
        print(error, file=out)
processes.barrier("together")
if not processes.primary:
    try:
        processes.barrier("alone", timeout=0.2)
    except TimeoutError as error:
        print(error, file=out)
try:
    processes.agree("config.seed", processes.index)
except UserError as error:
    print(error, file=out)
"""


def child(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    known = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_FLAGS", "SLURM"))}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**known, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_share_small_values(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    files = [tmp_path / str(index) for index in range(2)]
    children = [
        child(PAIR, str(file), JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index))
        for index, file in enumerate(files)
    ]
    for process in children:
        _, stderr = process.communicate(timeout=90)
        assert process.returncode == 0, stderr
    first, second = (file.read_text().splitlines() for file in files)
    common = ["{'steps': [7]}", "[0, 1]", "3"]
    disagreement = (
        "config.seed differs between processes: 0 on process 0, 1 on process 1; "
        "start all processes with the same command, files and versions"
    )
    assert second == [*common, "not all processes have reached 'alone' within 0.2 s", disagreement]
    assert first == [
        *common,
        "True False a",
        "True True b",
        "{'0': '0', '1': '1'}",
        "no process has set 'never' within 0.2 s",
    ]


START = """
import dataclasses, sys
from t5x_like.core import environment
from tests.training.faults_worker import CONFIG
config = dataclasses.replace(CONFIG, phase_seconds=dataclasses.replace(CONFIG.phase_seconds, start=2))
environment.apply(config)
from t5x_like.core.errors import UserError
from t5x_like.parallel import multihost
try:
    multihost.start(config, coordinator=sys.argv[1], process_id=int(sys.argv[2]), num_processes=2)
except UserError as error:
    sys.exit(f"t5x_like: {error}")
"""


def test_a_process_that_waits_in_vain_says_so_and_fails():
    address = f"127.0.0.1:{free_port()}"
    process = child(START, address, "1")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(
        f"t5x_like: process 1: not all processes have reached the coordinator {address} within 2 s"
    )


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        process = child(START, address, "0")
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.splitlines()[-1] == f"t5x_like: coordinator {address}: Address already in use; choose another port"


def test_a_run_of_one_needs_no_store():
    assert ALONE.primary
    assert ALONE.broadcast("x", [1]) == [1]
    assert ALONE.gather("x", 2) == [2]
    assert ALONE.agree("x", 3) == 3
    ALONE.barrier("x")


@pytest.fixture
def bare(monkeypatch):
    """An environment that says nothing about other processes."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "TPU_", "MEGASCALE", "KUBERNETES", "JAX_COORDINATOR", "JAX_PROCESS", "JAX_NUM_P")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_without_a_cluster_is_alone(bare):
    assert multihost.start(CONFIG) is ALONE
    assert multihost.start(CONFIG, coordinator="127.0.0.1:1", process_id=0, num_processes=1) is ALONE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process_id": 1}, "give all three"),
        ({"coordinator": "host:1", "process_id": 2, "num_processes": 2}, "should be from 0 to 1"),
        ({"coordinator": "host", "process_id": 0, "num_processes": 2}, "should be HOST:PORT"),
    ],
)
def test_incomplete_or_wrong_flags_are_refused(bare, flags, message):
    with pytest.raises(UsageError, match=message):
        multihost.start(CONFIG, **flags)


def test_a_process_number_in_the_environment_has_to_be_a_number(bare):
    bare.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(UsageError, match="JAX_PROCESS_ID='first'"):
        multihost.start(CONFIG)


def test_flags_go_before_the_environment(bare):
    bare.setenv("JAX_COORDINATOR_ADDRESS", "other:1")
    bare.setenv("JAX_PROCESS_ID", "1")
    bare.setenv("JAX_NUM_PROCESSES", "2")
    place = multihost._explicit("host:2", 0, None)
    assert place == multihost._Place("host:2", 0, 2, None)


SLURM = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]"}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_clusters_are_recognised(environ, found):
    assert (multihost._detected(environ) is not None) == found


def test_slurm_without_srun_is_named():
    environ = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}
    with pytest.raises(UserError, match="start the command with srun"):
        multihost._detected(environ)


def test_a_slurm_step_gives_the_whole_place(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    place = multihost._detected(SLURM | {"SLURM_PROCID": "1", "SLURM_JOB_ID": "4099"})
    assert place is not None and place.coordinator == "n1:61443"
    assert (place.process_id, place.num_processes) == (1, 2)
    given = multihost._detected(SLURM | {"JAX_COORDINATOR_ADDRESS": "ib1:5"})
    assert given is not None and given.coordinator == "ib1:5"
