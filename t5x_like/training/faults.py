"""Nothing hangs: a watchdog with a limit per phase, heartbeats between processes, and stops that save first.

What asks to stop: a signal (signals.py), or the machine's own notice that it will be taken (notices.py).

Each process runs two threads. The monitor keeps the clock, reads signals and ends the process; the messenger
(messenger.py) does every key-value call, because a call to a dead coordinator can block for minutes. A process ends by
one line on stderr, the stacks in its log (those of a phase that took too long on stderr too) and `os._exit`, never
through jax's exit barrier, which waits for the others. Not here: what a NaN or a spike means (training/step.py,
loop.py), and the exit statuses' table (__main__.py).
"""

import contextlib
import dataclasses
import faulthandler
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

from t5x_like.core.environment import RuntimeConfig
from t5x_like.core.errors import UserError
from t5x_like.parallel import multihost
from t5x_like.parallel.multihost import ALONE, Processes
from t5x_like.training import notices
from t5x_like.training.messenger import LEAVING, ROUND, Messenger, Shared
from t5x_like.training.notices import Notices
from t5x_like.training.signals import Signals, warns

PREEMPTED = 75  # exit status: saved (or nothing to save), start again

_TICK = 0.25  # s between looks of the monitor
_STUCK = 120.0  # s without the monitor running (the interpreter's lock is held) after which the C timer ends us
_UNSAVED = ("start", "prepare", "compile")  # phases in which a stop does not wait: there is nothing new to save


class Faults:
    """The watchdog of one process. The loop names its phases and asks whether to stop; the rest runs by itself.

    Use as a context: an exception that passes through ends a run of several processes with its message on all of
    them; in a run of one it just passes. `enter` and `should_stop` together cost about a microsecond.
    """

    def __init__(self, config: RuntimeConfig, *, log_path: str | None, processes: Processes = ALONE) -> None:
        self._limits = {**dataclasses.asdict(config.phase_seconds), "prepare": 0.0, "end": 0.0}
        # A third of jax's limit, counted from the last heartbeat: jax speaks half to one limit after its own.
        self._silence = config.heartbeat_seconds / 3
        self._processes = processes
        self._log: TextIO | None = None
        self._state = Shared()
        self._compiled = 0
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._messenger = None
        if processes.store is not None:
            self._messenger = Messenger(processes, self._state, self._closed, silence=self._silence, end=self._end)
        self._signals = Signals(forward=processes.count > 1)
        self._notices = Notices(notices.server())
        self._parting: list[Callable[[str, int], object]] = []
        self._monitor = threading.Thread(target=self._watch, name="faults-monitor", daemon=True)
        self._monitor.start()
        if self._messenger:
            self._messenger.thread.start()
        if log_path:
            self.log_to(log_path)
        if processes.aborts:
            processes.aborts.explain = self._explain_abort
            processes.aborts.write = self._record

    def __enter__(self) -> "Faults":
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        if error is not None:
            self.fatal(error)
        self.close()

    def log_to(self, path: str) -> None:
        """Names the local file that stacks and tracebacks go to, once it is known."""
        self._log = open(path, "a", encoding="utf-8")

    def before_exit(self, action: Callable[[str, int], object]) -> None:
        """Calls this with (line, exit status) when this process ends itself, in a thread, for a few seconds at most."""
        self._parting.append(action)

    # For the loop.

    def enter(self, phase: str) -> None:
        """The phase that begins now; entering it again restarts its time.

        start, prepare (no limit), compile, step, evaluate, save, end (no limit).
        """
        if phase not in self._limits:
            raise ValueError(f"phase {phase!r} should be one of {', '.join(self._limits)}")
        self._state.phase = (phase, self._state.awake)

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """A phase inside another, whose time starts anew afterwards.

        Leaving `compile` waits for the other processes: they compile at different speeds (on the CPU only process 0
        has a compilation cache), and gloo gives a new group of devices 30 seconds for its first collective.
        """
        outer = self._state.phase[0]
        self.enter(phase)
        try:
            yield
            if phase == "compile":
                self._compiled += 1
                self._processes.barrier(f"compiled/{self._compiled}", timeout=math.inf)
        finally:
            self.enter(outer)

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after `step` updates; the same answer on all processes, asked at every step."""
        self._state.step = step
        if self._processes.count == 1:
            return self._state.signal is not None
        return self._signals.synchronised and multihost_utils.reached_preemption_sync_point(step)

    def interrupted(self) -> bool:
        """Whether to leave what can be left at once. Several processes must agree first, which takes a step: False."""
        return self._processes.count == 1 and self._state.signal is not None

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Reports an exception before anything else is unwound: closing a checkpoint would wait for the others."""
        try:
            yield
        except BaseException as error:
            self.fatal(error)
            raise

    def fatal(self, error: BaseException) -> None:
        """Leaves a run of several processes with the message of `error` on all of them; returns in a run of one."""
        if isinstance(error, SystemExit) and error.code in (None, 0, PREEMPTED):
            return
        self._record("".join(traceback.format_exception(error)).rstrip())
        if self._processes.count == 1:
            return
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # Most likely the echo of another process's end: whoever knows the cause gets the time to say it.
            self._state.phase = ("end", self._state.awake)
            self._closed.wait(self._silence + 2 * ROUND)
        user = isinstance(error, UserError)
        text = " ".join(str(error).split())
        message = text if user else f"{type(error).__name__}: {text}"
        self._end(f"process {self._processes.index} failed: {message[:500]}", getattr(error, "exit_status", 1))

    def close(self) -> None:
        """Ends the watch: the others no longer expect heartbeats. Twice is once."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._notices.close()
        self._signals.restore()
        self._monitor.join(2)
        if not self._monitor.is_alive():
            self._signals.close()
        if self._messenger:
            faulthandler.cancel_dump_traceback_later()
            self._messenger.thread.join(2)
        if self._log and not self._processes.aborts:
            with contextlib.suppress(OSError):
                self._log.close()

    # The monitor.

    def _watch(self) -> None:
        last = armed = time.monotonic()
        while not self._closed.is_set():
            names = self._signals.wait(_TICK)
            now = time.monotonic()
            self._state.awake += min(now - last, 4 * _TICK)
            last = now
            for name in names:
                self._on_signal(name)
            for notice, is_new in self._notices.take():
                self._on_notice(notice, is_new=is_new)
            self._check()
            if self._messenger and now - armed > _STUCK / 8:
                armed = now
                faulthandler.dump_traceback_later(_STUCK, exit=True, file=self._log or 2)

    def _check(self) -> None:
        phase, entered = self._state.phase
        limit = self._limits[phase]
        stop = self._state.signal or self._state.elsewhere
        if stop and phase in _UNSAVED:
            self._end(f"{self._name}stopped by {stop} in phase {phase}: nothing to save, start again", PREEMPTED)
        if limit and self._state.awake - entered > limit:
            others = self._messenger.states() if self._messenger else ""
            self._end(
                f"{self._name}no progress in phase {phase!r} for {limit:g} s "
                f"(config.runtime.phase_seconds.{phase}), step {self._state.step}{others}",
                stacks=True,
            )
        if self._messenger:
            self._messenger.check()

    @property
    def _name(self) -> str:
        return f"process {self._processes.index}: " if self._processes.count > 1 else ""

    def _on_signal(self, name: str) -> None:
        before = self._state.signal
        if before and warns(name):
            return
        if before and not warns(before):
            self._end(f"{self._name}second signal ({name}): ends at once, without saving")
        self._state.signal = name
        if self._state.phase[0] not in _UNSAVED:
            more = "SIGTERM or SIGINT twice" if warns(name) else "a second signal"
            self._say(f"{self._name}{name}: saves after this step and ends; {more} ends at once")

    def _on_notice(self, notice: str, *, is_new: bool) -> None:
        if not is_new:
            self._say(f"{self._name}{notice} stood before this start: the run goes on, and saves at a signal")
            return
        self._on_signal(notice)
        self._signals.forward()

    # Ending.

    def _end(self, line: str, status: int = 1, *, tell: str | None = "fault", stacks: bool = False) -> None:
        """Says why, tells the others, and ends the process. Only the first caller speaks.

        `tell`: "fault" publishes the line, "left" only takes leave, None is silent (there is nobody to hear).
        `stacks`: where every thread stands goes to stderr too.
        """
        if self._closed.is_set():
            return
        if not self._ending.acquire(blocking=False):
            time.sleep(LEAVING + 2)
            os._exit(status)
        self._say(line)
        if self._log and status != PREEMPTED:
            faulthandler.dump_traceback(file=self._log, all_threads=True)
        if stacks:
            faulthandler.dump_traceback(file=2, all_threads=True)
        # In threads: a call blocks when the coordinator, or the disk, is gone.
        last = [threading.Thread(target=self._part, args=(line, status), daemon=True)]
        if self._messenger and tell:
            last.append(threading.Thread(target=self._messenger.leave, args=(line, status, tell), daemon=True))
        for thread in last:
            thread.start()
        deadline = time.monotonic() + LEAVING + 1
        for thread in last:
            thread.join(max(0.0, deadline - time.monotonic()))
        os._exit(status)

    def _part(self, line: str, status: int) -> None:
        for action in self._parting:
            with contextlib.suppress(Exception):  # it must not replace what ends us
                action(line, status)

    def _say(self, line: str) -> None:
        # Not through sys.stderr, whose lock may be held by a thread that hangs.
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            os.write(2, f"t5x_like: {line}\n".encode())
        self._record(line)

    def _record(self, text: str) -> None:
        # A log that cannot be written (a full disk) must not replace what it should tell.
        with contextlib.suppress(OSError):
            if self._log:
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
                self._log.flush()

    def _explain_abort(self) -> str:
        """Called while jax aborts this process from C++."""
        address = self._processes.coordinator
        who = f"process {self._processes.index}"
        if address and self._processes.index and not multihost.answers(address):
            return f"{who}: process 0, which runs the coordinator {address}, has ended; its log may say why"
        return f"{who}: jax lost the coordinator {address} or another process"
