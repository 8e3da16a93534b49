"""What a Slurm step says of its processes: who is process 0, and which GPUs of a node belong to which process.

jax reads the same variables, but takes one GPU for each process whatever a node has, and stumbles over node lists such
as `node[7]` and `rack[1-2]node[1-4]`. Sources: the manual pages of srun and scontrol.
"""

import glob
import re
import socket
from collections.abc import Mapping

from t5x_like.core.errors import UserError

# Slurm's own ports and the ephemeral ones of Linux end below.
_FIRST_PORT, _PORTS = 61440, 4096


def in_step(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks; UserError in the shell of a job, where `srun` is missing."""
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" not in environ or not tasks.isdigit() or int(tasks) < 2:
        return False
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        raise UserError(f"SLURM_NTASKS={tasks}, but this is no Slurm step; start the command with srun")
    return True


def coordinator(environ: Mapping[str, str]) -> str:
    """HOST:PORT of process 0, which runs on the first node; the same for all tasks of a step.

    Where nodes have no addresses by their names, it is the one that srun was started from: in a batch job that is the
    first node. JAX_COORDINATOR_PORT names another port.
    """
    host = first_host(environ["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        host = environ.get("SLURM_LAUNCH_NODE_IPADDR") or host
    port = environ.get("JAX_COORDINATOR_PORT") or str(_FIRST_PORT + int(environ["SLURM_JOB_ID"]) % _PORTS)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def first_host(nodes: str) -> str:
    """The first name in a list of nodes as Slurm writes them.

    >>> first_host("node[001-003,7],login1"), first_host("rack[1-2]node[3,9]-ib"), first_host("a,b[1-2]")
    ('node001', 'rack1node3-ib', 'a')
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+(?=,|$)", nodes)
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else ""
    if not re.fullmatch(r"[\w.-]+", host):
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} should be a list of hosts, such as node[001-003,7],login1")
    return host


def tasks_of_nodes(tasks: str) -> list[int]:
    """The number of tasks on each node, as SLURM_STEP_TASKS_PER_NODE gives them.

    >>> tasks_of_nodes("1(x2),3,4(x3)")
    [1, 1, 3, 4, 4, 4]
    """
    found: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={tasks!r} should be numbers of tasks, such as 1(x2),3")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """This process's GPUs, counted among those that it sees: all for one task a node, else an equal share.

    None where there are none. UserError where they cannot be shared equally.
    """
    given = environ.get("SLURM_STEP_TASKS_PER_NODE")
    node, local = int(environ.get("SLURM_NODEID") or 0), int(environ.get("SLURM_LOCALID") or 0)
    tasks = tasks_of_nodes(given)[node] if given else 1
    count = _gpus(environ)
    if count < 2:
        return [0] if count else None  # one task, or srun has given each task a GPU of its own
    share, rest = divmod(count, tasks)
    if rest:
        raise UserError(
            f"{count} GPUs of {environ.get('SLURMD_NODENAME', 'this node')} cannot be shared by {tasks} processes; "
            "start one process a node, or one a GPU"
        )
    return list(range(local * share, (local + 1) * share))


def _gpus(environ: Mapping[str, str]) -> int:
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible:
        return len(visible.split(","))
    return int(environ.get("SLURM_GPUS_ON_NODE") or 0) or len(glob.glob("/dev/nvidia[0-9]*"))
