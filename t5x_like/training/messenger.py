"""What the watchdogs of several processes (faults.py) tell each other: heartbeats, faults and stops, by the store."""

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from t5x_like.parallel.multihost import Processes

ROUND = 1.0  # s between rounds of the messenger
LEAVING = 3.0  # s that the coordinator's process waits for the others to read why it ends
_LEFT = "left"


@dataclasses.dataclass
class Shared:
    """What the threads of one process share. Each field has one writer; reading and setting one is atomic.

    awake: seconds this process has run; a stopped process, or a sleeping machine, does not age. phase: its name, and
    when it was entered. signal: the first one to this process, or the notice to its machine; elsewhere: one to
    another process.
    """

    awake: float = 0.0
    phase: tuple[str, float] = ("start", 0.0)
    step: int = 0
    signal: str | None = None
    elsewhere: str | None = None


class Messenger:
    """Heartbeats and messages between processes, over the coordinator's store.

    Every process writes a heartbeat each second. Process 0 reads them all; the others read only the folder `watch`,
    with the heartbeat of process 0 and the messages, so that the coordinator's load grows with the number of processes,
    not its square. `check` is called by the monitor, everything else that touches the store by the messenger's thread.
    silence: seconds without a heartbeat after which `end(line, status, tell=)` ends this process.
    """

    def __init__(
        self,
        processes: Processes,
        state: Shared,
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
            self._closed.wait(ROUND)
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
        if state.awake - self._answered > 2 * ROUND:
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
            deadline = time.monotonic() + LEAVING
            while waited and time.monotonic() < deadline:
                waited -= {int(index) for index, beat in self._store.folder("alive").items() if beat == _LEFT}
                time.sleep(0.1)
