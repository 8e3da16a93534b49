"""The process in which answers are judged: what hangs, or ends it, can be killed without harm to the run.

Reads JSON lines: first {"path": sys.path, "verifiers": {name: how it is made}}, then requests [number, name, prompt,
answer, expected]. Answers each by [number, value, error]; value is null where there is an error. What a function prints
goes to stderr.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys

from t5x_like.rl import verifiers


def main() -> None:
    _end_with_parent()
    _leave_signals_to_the_run()
    _limit_memory()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    first = json.loads(sys.stdin.readline())
    sys.path[:] = first["path"]

    def answer(number: int, value: float | None, error: str) -> None:
        out.write(json.dumps([number, value, error]) + "\n")
        out.flush()

    made = {}
    for name, how in first["verifiers"].items():
        try:
            made[name] = verifiers.make(**how)
        except Exception as error:  # whatever a file of a user may do wrong
            return answer(-1, None, f"config.rl.rewards.{name}: {_line(error)}")
    answer(-1, 0.0, "")
    for line in sys.stdin:
        number, name, *texts = json.loads(line)
        try:
            value = float(made[name](*texts))
        except Exception as error:
            answer(number, None, f"raised {_line(error)}")
            continue
        bad = "" if math.isfinite(value) else f"returned {value}"
        answer(number, None if bad else value, bad)


def _end_with_parent() -> None:
    """Linux: a function that hangs must not outlive a run that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _leave_signals_to_the_run() -> None:
    """Slurm sends its warnings to every process of a job; the run saves, and needs the answers that are due.

    By a handler, which programs that a function starts do not inherit, as they would SIG_IGN.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)


def _limit_memory() -> None:
    """Half of the machine's memory, so that a function which wants more raises MemoryError and the run goes on."""
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (half if hard == resource.RLIM_INFINITY else min(half, hard), hard))


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
