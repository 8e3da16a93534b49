"""Saves that fail (a full disk) or never end (SIGKILL): the run goes on, and what was committed before stands."""

import contextlib
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.quiet import quiet_orbax

ROOT = pathlib.Path(__file__).parents[2]


def _state(mebibytes: int):
    values = np.random.default_rng(0).standard_normal((mebibytes, 2**18), dtype=np.float32)
    return {"params": {"w": jnp.asarray(values)}}


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MiB where this process may mount one; else None."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)]
    mounted = False
    with contextlib.suppress(OSError):
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    yield directory if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_full_disk_is_a_fault_and_the_run_goes_on(small_disk, tmp_path, monkeypatch, capfd):
    directory = (small_disk or tmp_path) / "checkpoints"

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")

    faults: list[str] = []
    with Checkpoints(str(directory), keep=lambda steps, metrics: steps[-2:], on_fault=faults.append) as checkpoints:
        assert checkpoints.save(1, _state(1), {}) and checkpoints.wait()
        with monkeypatch.context() as patch:
            if small_disk is None:  # no right to mount: the write fails as it does on a full disk
                patch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.finalize", full)
            checkpoints.save(2, _state(6), {})
            assert not checkpoints.wait()
        assert len(faults) == 1 and "/2 could not be saved" in faults[0] and "newest checkpoint is 1" in faults[0]
        assert "No space left" in faults[0] and "\n" not in faults[0] and len(faults[0]) < 700
        assert os.listdir(directory) == ["1"]
        assert checkpoints.save(3, _state(1), {}) and checkpoints.wait()
        assert checkpoints.steps() == [1, 3] and len(faults) == 1
        template = {"params": {"w": jax.ShapeDtypeStruct((1, 2**18), jnp.float32)}}
        step, restored = checkpoints.restore_latest(template)
    assert step == 3 and np.array_equal(restored["params"]["w"], _state(1)["params"]["w"])
    assert "Traceback" not in capfd.readouterr().err


def test_a_save_that_fails_at_once_is_a_fault_too(tmp_path, monkeypatch):
    faults: list[str] = []
    with Checkpoints(str(tmp_path), on_fault=faults.append) as checkpoints:
        with monkeypatch.context() as patch:

            def refuse(*_, **__):
                raise OSError(28, "No space left on device")

            patch.setattr("orbax.checkpoint.AsyncCheckpointer.save", refuse)
            assert not checkpoints.save(1, _state(1), {})
        assert not checkpoints.wait() and checkpoints.latest() is None
        assert len(faults) == 1 and "No space left on device" in faults[0]
        assert checkpoints.save(2, _state(1), {}) and checkpoints.wait()


def test_further_failures_of_a_failed_save_are_not_told(caplog):
    """They come later, when Python collects the futures that Orbax left."""
    quiet_orbax()
    log = logging.getLogger("asyncio")
    for error in (ValueError('Error writing "/run/checkpoints/6.orbax-checkpoint-tmp/params/d/1": full'), OSError("x")):
        log.error("Future exception was never retrieved", exc_info=(type(error), error, None))
    assert [record.exc_info[0] for record in caplog.records] == [OSError]


def test_a_kill_at_any_moment_leaves_whole_checkpoints_only(tmp_path):
    """Children that save without rest are killed after a random time; each time what counts is readable and newest."""
    directory = tmp_path / "checkpoints"
    chance = random.Random(0)
    first = 0
    template = {"params": {name: jax.ShapeDtypeStruct((256, 512), jnp.float32) for name in ("a", "b")}}
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "storage" / "saver.py"), str(directory), str(first)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as child:
            assert child.stdout is not None
            begun = [int(child.stdout.readline()) for _ in range(3)]
            time.sleep(chance.random() * 0.3)
            child.send_signal(signal.SIGKILL)
            begun += [int(line) for line in child.stdout.read().split()]
        with Checkpoints(str(directory)) as checkpoints:
            step, restored = checkpoints.restore_latest(template)
            assert all(name.isdigit() for name in os.listdir(directory))
            # A save is begun only when the one before is committed.
            assert step >= begun[-1] - 1
            for name in ("a", "b"):
                assert np.array_equal(restored["params"][name][0], step + np.arange(512.0, dtype=np.float32))
        first = step + 1
    assert first >= 6
