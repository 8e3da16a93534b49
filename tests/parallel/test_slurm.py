"""What a Slurm step says: the first host of odd lists, the port, and which GPUs belong to which process."""

import socket

import pytest

from t5x_like.core.errors import UserError
from t5x_like.parallel import slurm


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node[7]", "node7"),
        ("node[001-003,7],login1", "node001"),
        ("node[001,007-015]", "node001"),
        ("login1,node[001-003]", "login1"),
        ("gpu[12-15]-ib", "gpu12-ib"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("a[1-2,5]b[7],c", "a1b7"),
        ("tpu-host.cluster.local,x", "tpu-host.cluster.local"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "node[", "node[]", "a b", "node[1-2", "n1]"])
def test_what_is_no_list_of_hosts_is_named(nodes):
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST=.* should be a list of hosts"):
        slurm.first_host(nodes)


def test_all_tasks_of_a_step_name_the_same_coordinator(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "70001", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"}
    found = {slurm.coordinator(step | {"SLURM_PROCID": rank, "SLURMD_NODENAME": f"n{rank}"}) for rank in "01"}
    assert found == {f"n1:{61440 + 70001 % 4096}"}
    assert slurm.coordinator(step | {"JAX_COORDINATOR_PORT": "5000"}) == "n1:5000"


@pytest.mark.parametrize(("address", "host"), [("10.0.0.9", "10.0.0.9"), ("fd00::9", "[fd00::9]"), ("", "n1")])
def test_a_node_without_an_address_is_reached_where_srun_ran(monkeypatch, address, host):
    def unknown(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    step = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "1", "SLURM_LAUNCH_NODE_IPADDR": address}
    assert slurm.coordinator(step) == f"{host}:61441"


@pytest.mark.parametrize(
    ("tasks", "place", "gpus", "devices"),
    [
        ("1(x2)", (1, 0), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ("1", (0, 0), {"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb"}, [0, 1]),
        ("4(x2)", (1, 2), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2]),
        ("2(x2)", (0, 1), {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [2, 3]),
        ("1(x2),4,2", (2, 3), {"SLURM_GPUS_ON_NODE": "4"}, [3]),
        # srun --gpus-per-task=1 shows each task its own GPU alone.
        ("4(x2)", (0, 3), {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, [0]),
        ("1(x2)", (0, 0), {}, None),
        ("2(x2)", (0, 1), {}, None),
    ],
)
def test_gpus_are_shared_by_the_processes_of_a_node(monkeypatch, tasks, place, gpus, devices):
    monkeypatch.setattr(slurm.glob, "glob", lambda _: [])
    node, local = map(str, place)
    step = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node, "SLURM_LOCALID": local}
    assert slurm.local_devices(step | gpus) == devices


def test_gpus_that_cannot_be_shared_are_named(monkeypatch):
    step = {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8", "SLURMD_NODENAME": "n5"}
    with pytest.raises(UserError, match="8 GPUs of n5 cannot be shared by 3 processes"):
        slurm.local_devices(step)
    with pytest.raises(UserError, match="should be numbers of tasks"):
        slurm.tasks_of_nodes("2(x2")
