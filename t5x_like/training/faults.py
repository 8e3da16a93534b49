"""Nothing hangs: a watchdog with a limit per phase, heartbeats between processes, and stops that save first.

Each process runs two threads. The monitor keeps the clock, reads signals and ends the process; the messenger does
every key-value call, because a call to a dead coordinator can block for minutes. A process ends by one line on
stderr, the stacks in its log and `os._exit`, never through jax's exit barrier, which waits for the others.
Not here: what a NaN or a spike means (training/step.py, loop.py), and the exit statuses' table (__main__.py).
"""

import contextlib
import dataclasses
import faulthandler
import json
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
from t5x_like.training.signals import WARNINGS, Signals

PREEMPTED = 75  # exit status: saved (or nothing to save), start again

_TICK = 0.25  # s between looks of the monitor
_ROUND = 1.0  # s between rounds of the messenger
_LEAVING = 3.0  # s that the coordinator's process waits for the others to read why it ends
_STUCK = 120.0  # s without the monitor running (the interpreter's lock is held) after which the C timer ends us
_UNSAVED = ("start", "prepare", "compile")  # phases in which a stop does not wait: there is nothing new to save
_LEFT = "left"


@dataclasses.dataclass
class _State:
    """What the threads of one process share. Each field has one writer; reading and setting one is atomic.

    awake: seconds this process has run; a stopped process, or a sleeping machine, does not age. phase: its name, and
    when it was entered. signal: the first one to this process; elsewhere: one to another process.
    """

    awake: float = 0.0
    phase: tuple[str, float] = ("start", 0.0)
    step: int = 0
    signal: str | None = None
    elsewhere: str | None = None


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
        self._state = _State()
        self._compiled = 0
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._messenger = None
        if processes.store is not None:
            self._messenger = _Messenger(processes, self._state, self._closed, silence=self._silence, end=self._end)
        self._signals = Signals(forward=processes.count > 1)
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
            self._closed.wait(self._silence + 2 * _ROUND)
        user = isinstance(error, UserError)
        text = " ".join(str(error).split())
        message = text if user else f"{type(error).__name__}: {text}"
        self._end(f"process {self._processes.index} failed: {message[:500]}", getattr(error, "exit_status", 1))

    def close(self) -> None:
        """Ends the watch: the others no longer expect heartbeats. Twice is once."""
        if self._closed.is_set():
            return
        self._closed.set()
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
                f"(config.runtime.phase_seconds.{phase}), step {self._state.step}{others}"
            )
        if self._messenger:
            self._messenger.check()

    @property
    def _name(self) -> str:
        return f"process {self._processes.index}: " if self._processes.count > 1 else ""

    def _on_signal(self, name: str) -> None:
        before = self._state.signal
        if before and name in WARNINGS:
            return
        if before and before not in WARNINGS:
            self._end(f"{self._name}second signal ({name}): ends at once, without saving")
        self._state.signal = name
        if self._state.phase[0] not in _UNSAVED:
            more = "SIGTERM or SIGINT twice" if name in WARNINGS else "a second signal"
            self._say(f"{self._name}{name}: saves after this step and ends; {more} ends at once")

    # Ending.

    def _end(self, line: str, status: int = 1, *, tell: str | None = "fault") -> None:
        """Says why, tells the others, and ends the process. Only the first caller speaks.

        `tell`: "fault" publishes the line, "left" only takes leave, None is silent (there is nobody to hear).
        """
        if self._closed.is_set():
            return
        if not self._ending.acquire(blocking=False):
            time.sleep(_LEAVING + 2)
            os._exit(status)
        self._say(line)
        if self._log and status != PREEMPTED:
            faulthandler.dump_traceback(file=self._log, all_threads=True)
        if self._messenger and tell:
            # In a thread, since the call blocks when the coordinator is gone.
            farewell = threading.Thread(target=self._messenger.leave, args=(line, status, tell), daemon=True)
            farewell.start()
            farewell.join(_LEAVING + 1)
        os._exit(status)

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


class _Messenger:
    """Heartbeats and messages between processes, over the coordinator's store.

    Every process writes a heartbeat each second. Process 0 reads them all; the others read only the folder `watch`,
    with the heartbeat of process 0 and the messages, so that the coordinator's load grows with the number of processes,
    not its square. `check` is called by the monitor, everything else that touches the store by the messenger's thread.
    silence: seconds without a heartbeat after which `end(line, status, tell=)` ends this process.
    """

    def __init__(
        self,
        processes: Processes,
        state: _State,
        closed: threading.Event,
        *,
        silence: float,
        end: Callable[..., None],
    ) -> None:
        assert processes.store is not None
        self._processes, self._store = processes, processes.store
        self._state, self._closed, self._silence, self._end = state, closed, silence, end
        self._count = 0
        self._answered = 0.0  # on the clock `awake`, as all times here
        self._seen: dict[int, tuple[str, float]] = {}  # process -> its last heartbeat, when it changed
        self._fault: dict[str, Any] | None = None  # the message of a process that failed
        self._leaving = False
        self.thread = threading.Thread(target=self._run, name="faults-messenger", daemon=True)

    def _run(self) -> None:
        while not self._closed.is_set() and not self._leaving:
            with contextlib.suppress(RuntimeError):
                self._round()
                self._answered = self._state.awake
            self._closed.wait(_ROUND)
        with contextlib.suppress(RuntimeError):
            self._beat(_LEFT)

    def _beat(self, value: str) -> None:
        index = self._processes.index
        self._store.set(f"alive/{index}" if index else "watch/0", value, overwrite=True)

    def _round(self) -> None:
        state, now = self._state, self._state.awake
        phase, entered = state.phase
        self._count += 1
        self._beat(f"{self._count} {phase} {now - entered:.0f} {state.step}")
        watch = self._store.folder("watch")
        beats = {0: watch["0"]} if "0" in watch else {}
        if self._processes.primary:
            beats |= {int(name): value for name, value in self._store.folder("alive").items()}
        for index, beat in beats.items():
            if self._seen.get(index, ("", 0.0))[0] != beat:
                self._seen[index] = (beat, now)
        if "fault" in watch:
            self._fault = json.loads(watch["fault"])
        # jax agrees on the step to stop at; this is for the phases that do not get that far.
        if state.signal and "stop" not in watch:
            self._store.set("watch/stop", f"{state.signal} of process {self._processes.index}")
        elif "stop" in watch:
            state.elsewhere = watch["stop"]

    def check(self) -> None:
        """Ends this process where another one failed, or has not been heard of for too long."""
        state, me, limit = self._state, self._processes.index, self._silence
        if self._fault:
            line, status = self._fault["line"], self._fault["status"]
            self._end(f"{line} (process {me} ends with it)", status, tell=_LEFT)
        if state.awake - self._answered > limit:
            address = self._processes.coordinator
            line = f"process {me}: the coordinator {address} (process 0) has not answered for {limit:.1f} s"
            self._end(line, tell=None)
        if state.awake - self._answered > 2 * _ROUND:
            return  # nobody is heard of: the coordinator is the one to blame, if it lasts
        for index, (beat, changed) in list(self._seen.items()):
            if index != me and beat != _LEFT and state.awake - changed > limit:
                self._end(
                    f"process {index} has given no heartbeat for {limit:.1f} s: it was killed or stopped, or its "
                    f"machine is out of reach (process {me} ends)"
                )

    def states(self) -> str:
        """Where the others are, as far as this process knows; for the line of a limit that was passed."""
        parts = []
        for index, (beat, _) in sorted(self._seen.items()):
            if index != self._processes.index and beat != _LEFT:
                _, phase, seconds, step = beat.split()
                parts.append(f"process {index} in {phase!r} for {seconds} s at step {step}")
        return "; " + ", ".join(parts) if parts else ""

    def leave(self, line: str, status: int, tell: str) -> None:
        """Tells the others why this process ends. The coordinator lives in process 0, which waits till all know."""
        self._leaving = True
        with contextlib.suppress(RuntimeError):
            if tell == "fault":
                self._store.set("watch/fault", json.dumps({"line": line, "status": status}))
            self._beat(_LEFT)
            if not self._processes.primary:
                return
            now, limit = self._state.awake, self._silence
            silent = {index for index, (_, changed) in self._seen.items() if now - changed > limit}
            waited = set(range(1, self._processes.count)) - silent
            deadline = time.monotonic() + _LEAVING
            while waited and time.monotonic() < deadline:
                waited -= {int(index) for index, beat in self._store.folder("alive").items() if beat == _LEFT}
                time.sleep(0.1)
