"""The command table of `t5x_like COMMAND ...`: finds the command, prints errors in one line, sets the exit status.

Commands are imported when they are called, so that `t5x_like --help` does not wait for jax.
Exit status: 0 done, 1 failed, 2 wrong use, 75 preempted and saved (start again), 130 interrupted by Ctrl-C.
"""

import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence

from t5x_like import __version__
from t5x_like.core import environment
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError

COMMANDS = {
    "train": "train a model from a config, or resume a workdir",
    "rl": "train a policy by rewards of its own answers",
    "prepare": "tokenize the data of a config into its cache",
    "plan": "compile a config for a TPU topology and print memory, cycles and collectives",
    "generate": "continue text with a model directory",
    "evaluate": "score models on tasks and texts",
    "convert": "convert a model directory to Hugging Face's files, or theirs to ours",
    "export": "write a model for others to use: plain or in int8, with model card and checksums",
    "inspect": "print what a model directory holds, or the documents in a batch",
}

PREEMPTED = 75
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_RUNS = ("train", "rl")
_STOPS = (signal.SIGTERM, signal.SIGUSR1)

_USAGE = "usage: t5x_like COMMAND ...\n\ncommands (COMMAND --help says more; --version):\n" + "\n".join(
    f"  {name:<10}{text}" for name, text in COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is not None:
        return _run(list(arguments))
    given = sys.argv[1:]
    if given and given[0] in _RUNS:
        # Held back meanwhile: a program that begins anew keeps what is blocked, and no handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        environment.restart_without_tcache()
        _leave_if_asked()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # generated text has characters that an encoding may lack
    status = _run(given)
    try:
        sys.stdout.flush()
    except OSError:  # its terminal or pipe has gone: without this Python exits with a status of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _leave_if_asked() -> None:
    """Until the session of a run listens (training/signals.py), SIGTERM and Slurm's SIGUSR1 end it with 75: a start
    that is preempted while it imports jax, or waits for other processes, is no fault.

    A thread reads them from a pipe, since the main one may be in C++ for minutes, where no Python handler runs.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _STOPS:
        signal.signal(number, _noted)

    def wait() -> None:
        while (received := os.read(reader, 1)) and received[0] not in _STOPS:
            pass
        name = signal.Signals(received[0]).name
        os.write(2, f"t5x_like: stopped by {name}: nothing to save, start again\n".encode())
        os._exit(PREEMPTED)

    threading.Thread(target=wait, name="early-signals", daemon=True).start()


def _noted(_number: int, _frame: object) -> None:
    """The pipe has it already."""


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else UsageError.exit_status
    if arguments == ["--version"]:
        print(f"t5x_like {__version__}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UsageError(f"command {command!r} is unknown; {nearest(command, COMMANDS)}")
        return importlib.import_module(f"t5x_like.commands.{command}").run(rest)
    except UserError as error:
        print(f"t5x_like: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # not of a train loop, which saves at SIGINT and returns 75
        print("t5x_like: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        return 0


if __name__ == "__main__":
    sys.exit(main())
