"""A run that is asked to stop before its session listens ends with 75: no fault, whatever it waits for."""

import ctypes
import pathlib
import signal
import subprocess
import sys

import pytest

from t5x_like.training import signals

ROOT = pathlib.Path(__file__).resolve().parents[1]
SLEEPS = "import time\nprint('up', flush=True)\ntime.sleep(60)\n"
# A lock that is taken twice: the main thread waits in C, and runs no Python handler.
WAITS_IN_C = """import ctypes
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
library.pthread_mutex_lock(mutex)
print('up', flush=True)
library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("command", "number", "config"),
    [("train", signal.SIGTERM, SLEEPS), ("rl", signal.SIGUSR1, SLEEPS), ("train", signal.SIGTERM, WAITS_IN_C)],
)
def test_a_start_that_is_stopped_before_it_begins_is_no_fault(tmp_path, command, number, config):
    path = tmp_path / "slow.py"
    path.write_text(config)
    arguments = [sys.executable, "-m", "t5x_like", command, f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "up\n"
            child.send_signal(number)
            _, said = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 75
    assert said == f"t5x_like: stopped by {signal.Signals(number).name}: nothing to save, start again\n"


def test_the_handler_of_jax_is_not_taken_for_that_of_python(monkeypatch):
    """jax puts its own in place a moment after the processes have joined."""
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    received = []
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(received.append)
    turns = []

    def later(_seconds):
        turns.append(1)
        if len(turns) == 3:
            library.signal(int(signal.SIGTERM), ctypes.cast(handler, ctypes.c_void_p))

    monkeypatch.setattr(signals.time, "sleep", later)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        taken = signals._take_handler(signal.SIGTERM)
        assert len(turns) == 3
        taken(15)
        assert received == [15]
        turns[:] = [1] * 10
        signal.signal(signal.SIGTERM, lambda *_: None)
        assert signals._take_handler(signal.SIGTERM) is None
    finally:
        signal.signal(signal.SIGTERM, before)
