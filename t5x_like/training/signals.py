"""The signals that ask a run to save and end: SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's warning).

A thread notices them at once, also while C++ code keeps Python's own handlers from running. With several processes
jax's own SIGTERM handler starts the agreement on a step to save at. A Python handler would silently disable it, so ours
stands before it and calls it. What a signal means is decided in faults.py.
"""

import ctypes
import os
import select
import signal
import threading
import time
from typing import Any


def warns(name: str) -> bool:
    """Whether a signal, or a notice, announces the end: a closed terminal may send several, Slurm a SIGTERM later."""
    return name not in ("SIGTERM", "SIGINT")


def asked() -> list[signal.Signals]:
    """The signals at which a run saves and ends. Who started it by nohup has set SIGHUP to be ignored, and so it is."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    return [each for each in numbers if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


class Signals:
    """The signals to this process since the last look, as bytes of a pipe that Python's C handler fills."""

    def __init__(self, *, forward: bool) -> None:
        self._jax_handler: Any = None
        self._before: dict[int, Any] = {}
        self._reader = self._writer = -1
        self.synchronised = False
        if threading.current_thread() is not threading.main_thread():
            return
        if forward:
            self._jax_handler = _take_handler(signal.SIGTERM)
            self.synchronised = self._jax_handler is not None
            if not self.synchronised:
                return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in asked():
            self._before[number] = signal.signal(number, _noted)

    def wait(self, seconds: float) -> list[str]:
        """The names of signals that arrive within `seconds`; at once when there is one."""
        if self._reader < 0:
            time.sleep(seconds)
            return []
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return []
        numbers = [number for number in os.read(self._reader, 64) if number in self._before]
        if numbers:
            self.forward()
        return [signal.Signals(number).name for number in numbers]

    def forward(self) -> None:
        """Has several processes agree on a step to save at, as a SIGTERM to this one would."""
        if self._jax_handler:
            self._jax_handler(int(signal.SIGTERM))

    def restore(self) -> None:
        """Puts back the handlers that stood before."""
        if self._reader < 0:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._writer, b"\0")  # ends a wait

    def close(self) -> None:
        """After `restore`, once nobody waits."""
        if self._reader >= 0:
            os.close(self._reader)
            os.close(self._writer)
            self._reader = -1


def _noted(_number: int, _frame: Any) -> None:
    """The wakeup pipe has it already."""


def _take_handler(number: int) -> Any:
    """The C handler of a signal as a function, taken out of its place; None if there is none within 2 seconds.

    jax installs its handler from a thread of its own, a moment after the processes are joined.
    """
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    # Python's own, of which all its signals have the same: that of __main__.py stands here until jax's does.
    before = signal.signal(signal.SIGUSR1, _noted)
    python = library.signal(int(signal.SIGUSR1), None)
    library.signal(int(signal.SIGUSR1), python)
    signal.signal(signal.SIGUSR1, before or signal.SIG_DFL)
    mine = library.signal(int(number), None)
    library.signal(int(number), mine)
    for _ in range(40):
        address = library.signal(int(number), python if mine == python else None)
        if address and address not in (1, python, ctypes.c_void_p(-1).value):
            return ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
        time.sleep(0.05)
    return None
