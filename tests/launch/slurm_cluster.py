"""A real Slurm on this machine for the tests: one slurmctld and two slurmd, on loopback and ports of their own.

    with cluster(folder) as slurm:
        slurm.run("sbatch", "--parsable", "script.sh")

Debian's packages slurmctld, slurmd and slurm-client, run as root, are enough. `python -m tests.launch.slurm_cluster
FOLDER` is what the tests start: it keeps the daemons and ends every process that has come from them, whatever becomes
of the tests.
"""

import contextlib
import ctypes
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

NODES = ("n1", "n2")
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DAEMONS = ("slurmctld", "slurmd")
_COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def missing() -> str | None:
    """Why there can be no cluster here, in one line, or None."""
    absent = [name for name in (*_DAEMONS, *_COMMANDS) if shutil.which(name, path=_path()) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurmctld slurmd slurm-client"
    return None if os.geteuid() == 0 else "slurmd runs jobs as root alone, and this is not root"


class Cluster:
    """Commands of a running cluster. `folder` holds its configuration, state and logs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str, document: str = "", check: bool = True) -> str:
        """The output of one command; `document` is its input."""
        how = {"env": self.environment, "input": document, "capture_output": True, "text": True, "timeout": 30}
        done = subprocess.run(command, **how)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode and so on."""
        text = self.run("scontrol", "show", "job", number)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def submit(self, script: str) -> str:
        """The number of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def finish(self, number: str, seconds: float = 60) -> dict[str, str]:
        """The job once it has ended. A requeued one starts at once, and not when its credential has expired."""
        found: dict[str, str] = {}

        def ended() -> bool:
            nonlocal found
            found = self.job(number)
            if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            return found["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.until(ended, seconds)
        return found

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Waits until `condition` holds; AssertionError with the logs after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.run('squeue')}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of every daemon."""
        parts = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(parts)


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[Cluster]:
    """A cluster with two idle nodes; nothing of it runs afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    _configure(folder)
    slurm = Cluster(folder)
    with open(folder / "keeper.log", "wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.slurm_cluster", str(folder)],
            cwd=_ROOT,
            env=slurm.environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_idle_nodes(slurm, keeper)
        yield slurm
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()  # also what happens when the tests die
        try:
            keeper.wait(20)
        finally:
            keeper.kill()
            keeper.wait()


def _wait_for_idle_nodes(slurm: Cluster, keeper: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while slurm.run("sinfo", "--noheader", "--format=%D %t", check=False).split() != ["2", "idle"]:
        assert keeper.poll() is None and time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def _configure(folder: pathlib.Path) -> None:
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(1 + len(NODES))
    settings = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        # Without authentication whoever reaches a port is root: no port but on loopback.
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "AuthType": "auth/none",
        "CredType": "cred/none",
        # A requeued job waits until its credential has expired: 120 s, or what is said here, 5 s or more.
        "AuthInfo": "cred_expire=5",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
        "ReturnToService": 2,
        "KillWait": 10,
        "SlurmdTimeout": 60,
        "SlurmdParameters": "config_overrides",  # more processors than there are
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    for node, port in zip(NODES, ports[1:], strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16")
    lines.append(f"PartitionName=all Nodes={','.join(NODES)} Default=YES State=UP OverSubscribe=NO")
    (folder / "state").mkdir(exist_ok=True)
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _path() -> str:
    """The daemons lie in /usr/sbin, which is not on everybody's path."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


# The keeper of the daemons, a process of its own.


def _keep(folder: str) -> int:
    """Runs the daemons until the input ends, then ends whatever has come from them."""
    library = ctypes.CDLL(None)
    # The steps of jobs leave their slurmd; they become children of this process, where they are found.
    library.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    for command in commands:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_keeper)
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        # A step that has ended and is not waited for would keep its job from completing.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    while children := _children():
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
    return 0


def _die_with_keeper() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _children() -> list[int]:
    me = os.getpid()
    return [int(name) for name in pathlib.Path(f"/proc/{me}/task/{me}/children").read_text().split()]


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1]))
