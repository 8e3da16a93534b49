"""A child process that does not outlive its parent, whatever ends that (Linux)."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

# Bound here: a child that is being forked may load nothing, since threads of ours may have held locks.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """What a child calls before its program (preexec_fn): on Linux it ends when this process does, however it does."""
    if _PRCTL is None:
        return None
    set_option, parent, number = _PRCTL, os.getpid(), int(signal.SIGKILL)

    def prepare() -> None:
        set_option(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before this was set
            os._exit(1)

    return prepare
