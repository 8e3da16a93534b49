"""Runs stages: skips what has been done, goes on with what was interrupted, and counts time.

FOLDER/stages/NAME.json is the record of a stage: its fingerprint, whether it is done, starts, seconds and CPU seconds.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_like.core.errors import UserError
from tools.lifecycle import stages as graph
from tools.lifecycle.stages import Stage

PREEMPTED = 75
_POLL_SECONDS, _NOTE_SECONDS = 0.05, 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """Somebody asked to stop; what runs has saved."""


def run(stages: Sequence[Stage], folder: str, *, environment: dict[str, str] | None = None) -> None:
    """Brings every stage to its end. Raises Stopped, or UserError where a command fails."""
    for name in ("stages", "logs"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    with _alone(folder), _Child() as child:
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            mark = graph.fingerprint(stage)
            record = record_of(stage, folder)
            begun = record.get("fingerprint") == mark
            if begun and record.get("done") and (not stage.makes or os.path.exists(stage.makes)):
                print(f"{title}: done before ({record['seconds']:.0f} s)", flush=True)
                continue
            goes_on = begun and not record.get("done") and stage.resumes
            if not goes_on:
                _remove(stage, folder)
                record = {"fingerprint": mark, "done": False, "starts": 0, "seconds": 0.0, "cpu_seconds": 0.0}
            print(f"{title}: {stage.says}{' (goes on)' if goes_on else ''} ...", flush=True)
            _finish(stage, folder, record, child, environment)
            print(f"{title}: {record['seconds']:.0f} s, {record['cpu_seconds']:.0f} s of CPU", flush=True)


def record_of(stage: Stage, folder: str) -> dict[str, Any]:
    """{} where there is none that can be read."""
    try:
        return json.loads(_record_path(stage, folder).read_text())
    except (OSError, ValueError):
        return {}


def log_path(stage: Stage, folder: str) -> str:
    return os.path.join(folder, "logs", f"{stage.name}.txt")


def _record_path(stage: Stage, folder: str) -> pathlib.Path:
    return pathlib.Path(folder, "stages", f"{stage.name}.json")


def _note(stage: Stage, folder: str, record: dict[str, Any]) -> None:
    path = _record_path(stage, folder)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.rename(path)


def _remove(stage: Stage, folder: str) -> None:
    """What a stage made before, if it lies in the lifecycle's own folder: what lies elsewhere is somebody's."""
    path, root = os.path.realpath(stage.makes), os.path.realpath(folder)
    if not stage.makes or os.path.commonpath([path, root]) != root or path == root:
        return
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def _finish(
    stage: Stage, folder: str, record: dict[str, Any], child: "_Child", environment: dict[str, str] | None
) -> None:
    """Starts the command until it ends with 0; 75 is a run that has saved and wants to be started again."""
    while True:
        record["starts"] += 1
        _note(stage, folder, record)
        before = record["seconds"], record["cpu_seconds"]
        with open(log_path(stage, folder), "wb" if record["starts"] == 1 else "ab") as log:
            for seconds, cpu in child.run([sys.executable, *stage.command], log, environment):
                record["seconds"], record["cpu_seconds"] = before[0] + seconds, before[1] + cpu
                _note(stage, folder, record)
        record["done"] = child.status == 0
        _note(stage, folder, record)
        if child.asked and not record["done"]:
            raise Stopped
        if child.status == 0:
            return
        if child.status != PREEMPTED:
            with open(log_path(stage, folder), errors="replace") as log:
                last = [line.strip() for line in log if line.strip()][-1:]
            raise UserError(
                f"the stage {stage.name!r} failed with status {child.status}; its last line: {''.join(last)} "
                f"({log_path(stage, folder)})"
            )


class _Child:
    """One command at a time, which gets the signals that this process gets. `asked`: there was one."""

    def __init__(self) -> None:
        self.status, self.asked = 0, False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Child":
        self._before = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(
        self, command: Sequence[str], log: Any, environment: dict[str, str] | None
    ) -> Iterator[tuple[float, float]]:
        """Gives (seconds, CPU seconds) so far, now and then and at the end."""
        if self.asked:
            raise Stopped
        begun = noted = time.monotonic()
        process = self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that Ctrl-C reaches it once, through here
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            now = time.monotonic()
            if done:
                break
            if now - noted > _NOTE_SECONDS:
                noted = now
                yield now - begun, _cpu_seconds(process.pid)
            time.sleep(_POLL_SECONDS)
        process.returncode = self.status = os.waitstatus_to_exitcode(status)
        self._process = None
        yield now - begun, used.ru_utime + used.ru_stime

    def _pass_on(self, *_: object) -> None:
        self.asked = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def _die_with_parent() -> None:
    """Where this program is killed, its command is asked to stop, so that the next start finds the folder free."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _cpu_seconds(process: int) -> float:
    """Of a running process and of its children that have ended; 0 where /proc does not say it."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _alone(folder: str) -> Iterator[None]:
    with open(os.path.join(folder, "stages", "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another lifecycle runs in this folder; wait for it, or give another") from None
        yield
