"""Runs of this machine: so many at once, each with its output in a file, all of them ended when this process is.

Linux ends the runs when a sweep is killed, also by SIGKILL; a sweep that is asked to stop (SIGTERM, Ctrl-C) asks its
runs to save, waits for them, and starts no more.
"""

import dataclasses
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from t5x_like.core.children import die_with_parent
from t5x_like.core.errors import UsageError, UserError
from t5x_like.storage import paths

OUTPUT = "log.output.txt"  # in the workdir of a run: what it would show on a terminal, of all its starts
PREEMPTED = 75
_POLL_SECONDS = 0.05
_WARNINGS = (signal.SIGHUP, signal.SIGUSR1)  # of a closed terminal, and of Slurm, which sends SIGTERM later
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_WARNINGS)


@dataclasses.dataclass(frozen=True)
class Task:
    """One start of a run: its command, and what is added to the environment."""

    name: str
    command: tuple[str, ...]
    workdir: str
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a start ended. status: as a shell has it, negative for a signal. said: its last line."""

    status: int
    seconds: float
    said: str


class Pool:
    """Use as a context; `run` may be called several times. `asked`: somebody asked to stop.

    gpus_each: how many GPUs each run sees, others than those that run beside it; 0: all of them.
    """

    def __init__(self, at_once: int, gpus_each: int = 0):
        self._places: list[Mapping[str, str]] = [gpus(place, gpus_each) for place in reversed(range(at_once))]
        self._running: list[_Run] = []
        self._asked = False
        self._orders = 0  # SIGTERM and SIGINT, of which the second ends the runs at once

    def __enter__(self) -> "Pool":
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._before.items():
            if not (number == signal.SIGHUP and handler == signal.SIG_IGN):  # set so by nohup
                signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._running:
            run.ask(end_now=True)
            run.child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self._asked

    @property
    def running(self) -> int:
        return len(self._running)

    def run(
        self, tasks: Sequence[Task], *, begins: Callable[[Task], None], ends: Callable[[Task, Ended], bool]
    ) -> None:
        """Runs all tasks, or until it is asked to stop. `ends` says whether to start the same task again."""
        waiting = list(reversed(tasks))
        while self._running or (waiting and not self.asked):
            while waiting and self._places and not self.asked:
                task = waiting.pop()
                try:
                    run = _Run(task, self._places[-1])
                except (UserError, OSError) as error:  # of its workdir; the others run on
                    ends(task, Ended(1, 0.0, f"it cannot be started: {error}"))
                    continue
                self._places.pop()
                self._running.append(run)
                begins(task)
                self._pass()  # to a run that was not in the list when a signal came
            for run in [each for each in self._running if each.child.poll() is not None]:
                self._running.remove(run)
                self._places.append(run.place)
                if ends(run.task, run.end()) and not self.asked:
                    waiting.append(run.task)
            time.sleep(_POLL_SECONDS)

    def _hear(self, number: int, _frame: object) -> None:
        self._asked = True
        self._orders += number not in _WARNINGS
        self._pass()

    def _pass(self) -> None:
        """Asks all runs for what we were asked for; a run that heard it before is not asked again."""
        if self._asked:
            for run in self._running:
                run.ask(end_now=self._orders > 1)


class _Run:
    """A child and its output, which is kept on a disk while it runs and goes to its bucket at the end."""

    def __init__(self, task: Task, place: Mapping[str, str]):
        self.task, self.place = task, place
        self._started = time.monotonic()
        self._told = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._target = paths.join(task.workdir, OUTPUT)
        if paths.is_remote(task.workdir):
            self._folder = tempfile.TemporaryDirectory(prefix="t5x_like-output-")
            self._path = os.path.join(self._folder.name, OUTPUT)
            if paths.exists(self._target):
                paths.copy_file(self._target, self._path)
        else:
            paths.make_directory(task.workdir)
            self._path = self._target
        with open(self._path, "ab") as output:
            output.write(f"$ {shlex.join(task.command)}\n".encode())
            output.flush()
            self._begin = output.tell()
            self.child = subprocess.Popen(
                task.command,
                env={**os.environ, **task.environment, **place, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C reaches us alone, and we pass it on
                preexec_fn=die_with_parent(),
            )

    def ask(self, *, end_now: bool) -> None:
        """Asks the child to save and end, once: a second SIGTERM would end it unsaved. Or ends it."""
        if self.child.poll() is not None or (self._told and not end_now):
            return
        self._told = True
        self.child.send_signal(signal.SIGKILL if end_now else signal.SIGTERM)

    def end(self) -> Ended:
        seconds = time.monotonic() - self._started
        with open(self._path, "rb") as output:
            output.seek(self._begin)
            said = _last_line(output)
        status = self.child.returncode
        if status < 0:
            said = f"ended by {signal.Signals(-status).name}{f'; before that: {said}' if said else ''}"
        if self._folder is not None:
            try:
                paths.copy_file(self._path, self._target)
            except UserError as error:  # how it ended is told all the same
                said = f"{said} (its output is lost: {error})"
            self._folder.cleanup()
        return Ended(status, seconds, said)


def gpus(place: int, each: int) -> dict[str, str]:
    """The variable that shows a run the GPUs of its place, of those that this process sees."""
    if not each:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else [str(number) for number in range((place + 1) * each)]
    own = names[place * each : (place + 1) * each]
    if len(own) < each:
        raise UsageError(
            f"CUDA_VISIBLE_DEVICES={seen} names {len(names)} GPUs, too few for {place + 1} runs of {each}; lower "
            "--max_parallel or --gpus_each"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def _last_line(output: IO[bytes]) -> str:
    """The last line with something in it: where a line was written over, what stands there at the end."""

    def lines() -> Iterator[str]:
        for line in output:
            text = line.decode(errors="replace").strip("\n").rpartition("\r")[2].strip()
            if text:
                yield text

    last = ""
    for text in lines():
        last = text
    return last[:500]
