"""Starts several processes of one command on this machine, on fake CPU devices, as a small stand-in for a cluster.

    python -m launch.local --processes=2 --devices=4 -- train --config=configs/pretrain/tiny.py --workdir=runs/tiny

Output is prefixed by the process; when one fails the others get a moment to say why and are then ended. The exit
status is that of the command (75: preempted and saved); a process ended by a signal becomes 1 and one line.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from t5x_like.core.children import die_with_parent
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import Parser

_NOISE = re.compile(r"\[Gloo\] Rank \d+ is connected to ")
_PREEMPTED = 75


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options, command = _parse(list(sys.argv[1:] if arguments is None else arguments))
    except UsageError as error:
        _say(str(error))
        return error.exit_status
    if options.dry_run:
        return _show(command, options)
    address = f"127.0.0.1:{free_port()}"
    children = [_start(command, index, options, address) for index in range(options.processes)]
    _say(f"coordinator {address}, process ids {' '.join(str(child.pid) for child in children)}")
    readers = [
        threading.Thread(target=_copy, args=(index, source, target), daemon=True)
        for index, child in enumerate(children)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    _forward_signals(children)
    try:
        status = _supervise(children, options.grace)
    finally:
        for child in children:
            child.kill()
            child.wait()
    for reader in readers:
        reader.join(2)
    return status


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="python -m launch.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--devices", type=int, default=0, help="fake CPU devices of each; 0: as the config says")
    parser.add_argument("--module", default="t5x_like", help="what each runs: python -m MODULE COMMAND ... (t5x_like)")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds the others get when one fails (10)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and their environment, start none")
    if "--" not in arguments and not {"-h", "--help"} & set(arguments):
        parser.error("give the command after --, for example: -- train --config=FILE --workdir=DIR")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if options.processes < 1 or not command:
        parser.error("give at least one process and a command after --")
    return options, command


def _show(command: list[str], options: argparse.Namespace) -> int:
    for index in range(options.processes):
        words = [f"{name}={value}" for name, value in _environment(index, options, "127.0.0.1:PORT").items()]
        print(shlex.join(["env", *words, *_line(command, options)]))
    print("# --dry_run: nothing was started")
    return 0


def _line(command: list[str], options: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", options.module, *command]


def _start(command: list[str], index: int, options: argparse.Namespace, address: str) -> subprocess.Popen[str]:
    return start(_line(command, options), _environment(index, options, address))


def _environment(index: int, options: argparse.Namespace, address: str) -> dict[str, str]:
    """What tells a process of the others."""
    environment = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_PROCESS_ID": str(index),
        "JAX_NUM_PROCESSES": str(options.processes),
    }
    if options.devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
    return environment


def start(line: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """A process of a run on this machine: it ends with us, has its own session, and speaks to others by loopback."""
    loopback = {
        "PYTHONUNBUFFERED": "1",
        # gRPC would send loopback traffic to a proxy, and jax warns of any variable of that kind.
        "JAX_CHECK_PROXY_ENVS": "false",
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1"])),
    }
    return subprocess.Popen(
        line,
        env={**os.environ, **loopback, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent(),
        start_new_session=True,  # a Ctrl-C reaches us alone, and we pass it on
    )


def _forward_signals(children: list[subprocess.Popen[str]]) -> None:
    """The first signal asks all children to save and end, once; a second SIGTERM or SIGINT ends them."""
    warnings: list[int] = []
    orders: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        heard = bool(warnings or orders)
        (warnings if number in (signal.SIGHUP, signal.SIGUSR1) else orders).append(number)
        if heard and len(orders) < 2:
            return  # they save already, and a second SIGTERM would keep them from it
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if len(orders) > 1 else signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGUSR1, pass_on)  # Slurm's warning, by sbatch --signal=USR1@120
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # set so by nohup
        signal.signal(signal.SIGHUP, pass_on)


def _supervise(children: list[subprocess.Popen[str]], grace: float) -> int:
    """Waits for all; the status of the first that failed, else 75 if any was preempted, else 0."""
    ended: dict[int, int] = {}
    failed: int | None = None
    deadline = float("inf")
    while len(ended) < len(children) and time.monotonic() < deadline:
        for index, child in enumerate(children):
            if index in ended or child.poll() is None:
                continue
            ended[index] = child.returncode
            if child.returncode not in (0, _PREEMPTED) and failed is None:
                failed = index
                deadline = time.monotonic() + grace
                _say(f"process {index} {_describe(child.returncode)}; the others have {grace:g} s to end")
        time.sleep(0.05)
    late = [index for index in range(len(children)) if index not in ended]
    if late:
        _say(f"ended after {grace:g} s: process {', '.join(map(str, late))}")
    if failed is not None:
        return ended[failed] if ended[failed] in (1, 2) else 1
    return _PREEMPTED if _PREEMPTED in ended.values() else 0


def _describe(status: int) -> str:
    """How a process ended.

    >>> _describe(-9), _describe(134), _describe(1)
    ('was ended by SIGKILL', 'was aborted (SIGABRT)', 'failed with status 1')
    """
    if status in (-signal.SIGABRT, 134):
        return "was aborted (SIGABRT)"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"failed with status {status}"


def _copy(index: int, source: TextIO, target: TextIO) -> None:
    for line in source:
        if not _NOISE.search(line):
            target.write(f"[{index}] {line}")
            target.flush()


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
