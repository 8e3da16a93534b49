"""Child processes that judge points side by side, each a `t5x_like plan --json`, within a limit of memory and of time.

All of them together may hold `memory` bytes. Where they hold more, the youngest is ended and waits until fewer run
beside it; one that needs more alone is given up, with that as its reason. They end when this process does. Memory is
read from /proc, so there is no limit where there is none.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from t5x_like.core.children import die_with_parent
from t5x_like.core.terminal import format_bytes, format_duration

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Task:
    """One plan. command: its words; log: a file for what it prints."""

    name: str
    command: tuple[str, ...]
    log: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child ended. status: of its process, None where it was ended for a limit. said: its last line, or the
    limit. peak: the most bytes that it was seen to hold."""

    status: int | None
    said: str
    seconds: float
    peak: int


@dataclasses.dataclass
class _Child:
    task: Task
    process: subprocess.Popen
    begun: float
    held: int = 0
    peak: int = 0


class Judges:
    """Use as a context, which ends what runs. seconds: limit of each child, 0 for none."""

    def __init__(self, jobs: int, *, memory: int, seconds: float, environment: Mapping[str, str] | None = None):
        self._jobs, self._memory, self._seconds = jobs, memory, seconds
        self._environment = {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}
        self._children: list[_Child] = []
        self._put_back: list[Task] = []
        self._needed = 0  # the most that a child was seen to hold

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            _end(child)
        self._children = []

    def run(self, following: Callable[[], Task | None], ended: Callable[[Task, Outcome], None]) -> None:
        """Asks `following` for a task whenever there is room, until none is left or runs; tells `ended` of each."""
        while True:
            while len(self._children) < self._jobs and self._room():
                task = self._put_back.pop() if self._put_back else following()
                if task is None:
                    break
                self._children.append(self._start(task))
            if not self._children:
                return
            time.sleep(_POLL_SECONDS)
            self._look(ended)

    def _room(self) -> bool:
        """Whether one more is likely to find memory."""
        held = sum(max(child.held, self._needed) for child in self._children)
        return not self._children or not self._memory or held + self._needed <= self._memory

    def _start(self, task: Task) -> _Child:
        with open(task.log, "wb") as log:
            process = subprocess.Popen(
                task.command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches us alone, and we end them
                preexec_fn=die_with_parent(),
            )
        return _Child(task, process, time.monotonic())

    def _look(self, ended: Callable[[Task, Outcome], None]) -> None:
        for child in list(self._children):
            if child.process.poll() is None:
                child.held = _held(child.process.pid)
                child.peak = max(child.peak, child.held)
                self._needed = max(self._needed, child.peak)
                if self._seconds and time.monotonic() - child.begun > self._seconds:
                    said = f"it took more than {format_duration(self._seconds)} to judge; --point_minutes gives it more"
                    self._stop(child, said, ended)
            else:
                self._children.remove(child)
                status = child.process.returncode
                said = _last_line(child.task.log)
                if status < 0:
                    name = _signal(-status)
                    said = f"its judge was ended by {name}{', perhaps for want of memory' if status == -9 else ''}"
                ended(child.task, Outcome(status, said, time.monotonic() - child.begun, child.peak))
        while self._memory and sum(child.held for child in self._children) > self._memory:
            youngest = max(self._children, key=lambda child: child.begun)
            if len(self._children) > 1:
                _end(youngest)
                self._children.remove(youngest)
                self._put_back.append(youngest.task)
            else:
                limit = format_bytes(self._memory)
                self._stop(youngest, f"its judge needs more than {limit} of memory; --memory_gib gives it more", ended)

    def _stop(self, child: _Child, said: str, ended: Callable[[Task, Outcome], None]) -> None:
        _end(child)
        self._children.remove(child)
        ended(child.task, Outcome(None, said, time.monotonic() - child.begun, child.peak))


def _signal(number: int) -> str:
    """
    >>> _signal(9), _signal(40)
    ('SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def available_memory() -> int:
    """Bytes that this machine can give without swapping; 0 where it does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(found) * 1024


def _held(pid: int) -> int:
    """Bytes of memory of a process and what it has started."""
    total, waiting = 0, [pid]
    while waiting:
        each = waiting.pop()
        try:
            pages = pathlib.Path(f"/proc/{each}/statm").read_text().split()[1]
            children = pathlib.Path(f"/proc/{each}/task/{each}/children").read_text().split()
        except (OSError, IndexError):
            continue
        total += int(pages) * os.sysconf("SC_PAGE_SIZE")
        waiting += map(int, children)
    return total


def _end(child: _Child) -> None:
    """With all that it has started: it has a session of its own."""
    try:
        os.killpg(child.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        child.process.kill()
    child.process.wait()


def _last_line(log: str) -> str:
    text = pathlib.Path(log).read_text(errors="replace")
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing said"
