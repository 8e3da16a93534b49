"""Rewards of answers: the parts that a config names, each with its weight, judged in a process of their own.

A verifier that raises, hangs, ends its process or returns no number that is finite in float32 gets the value of a
failure for that answer; a line names it, the first few times of a batch, and one counts the rest. Such a run is only as
repeatable as its verifiers are.
"""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from t5x_like.core.errors import UserError
from t5x_like.rl.config import RlConfig
from t5x_like.rl.verifiers import Named

_START_SECONDS = 120.0  # for a worker to import the file of a config
_LARGEST = float(np.finfo(np.float32).max)
_SAID = 3  # failures of one part that have a line of their own, of those that are judged together


class Sample(NamedTuple):
    """One answer: what was asked, what the model said, and what a verifier compares it with."""

    prompt: str
    answer: str
    expected: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """values, failed [K, n]: of each part (in the order of `names`) and answer; failed is 1 where there is no value."""

    values: Float[np.ndarray, "K n"]
    failed: Int[np.ndarray, "K n"]


class Rewards:
    """The parts of the reward of a run; use as a context manager. `warn` gets one line for each failure."""

    def __init__(self, config: RlConfig, functions: Mapping[str, Named], *, warn: Callable[[str], None]):
        self.names = list(config.rewards)
        self.weights = np.array([part.weight for part in config.rewards.values()], np.float64)
        self.of_model = [part.kind == "model" for part in config.rewards.values()]
        self._limit, self._failure, self._warn = config.reward_seconds, config.failure_value, warn
        self._made = {
            name: {
                "kind": part.kind,
                "pattern": part.pattern,
                "function": None if part.function is None else dataclasses.asdict(functions[part.function]),
            }
            for name, part in config.rewards.items()
            if part.kind != "model"
        }
        self._worker: _Worker | None = None

    def __enter__(self) -> "Rewards":
        self._worker = _Worker(self._made)
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def judge(self, samples: Sequence[Sample], *, where: str, progress: Callable[[], None]) -> Judged:
        """`where` says in a warning when these were made; `progress` is called after each answer, since each may take
        all of its time. The parts of a reward model stay 0: it judges elsewhere."""
        values = np.zeros((len(self.names), len(samples)), np.float32)
        failed = np.zeros(values.shape, np.int32)
        for part, name in enumerate(self.names):
            for index, sample in enumerate(samples if name in self._made else ()):
                value, problem = self._ask(name, sample)
                progress()
                if problem and failed[part].sum() < _SAID:
                    self._warn(
                        f"{where}: config.rl.rewards.{name} {problem} on the answer {sample.answer!r:.80} to "
                        f"{sample.prompt!r:.80}; its value is {self._failure:g}"
                    )
                values[part, index] = self._failure if problem else value
                failed[part, index] = bool(problem)
            if failed[part].sum() > _SAID:
                self._warn(
                    f"{where}: config.rl.rewards.{name} failed for {failed[part].sum()} of {len(samples)} answers, of "
                    f"which the first {_SAID} are named"
                )
        return Judged(values, failed)

    def total(self, values: Float[np.ndarray, "K n"]) -> Float[np.ndarray, " n"]:
        """The weighted sum of the parts, in float64."""
        return self.weights @ values.astype(np.float64)

    def _ask(self, name: str, sample: Sample) -> tuple[float, str]:
        """(value, what is wrong)."""
        if self._worker is None:
            self._worker = _Worker(self._made)
        try:
            value, problem = self._worker.ask(name, sample, self._limit)
            if not problem and not abs(value) <= _LARGEST:
                return 0.0, f"returned {value:g}, which float32 does not hold"
            return value, problem
        except TimeoutError:
            problem = f"took longer than {self._limit:g} s (config.rl.reward_seconds)"
        except EOFError:
            problem = f"ended its process (status {self._worker.kill()})"
        self._worker.kill()
        self._worker = None
        return 0.0, problem


class _Worker:
    """A process that runs rl/worker.py."""

    def __init__(self, made: Mapping[str, Any]):
        # The path is that of this process, so that a worker finds what the config found.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "t5x_like.rl.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run, which saves
        )
        self._asked, self._rest = 0, b""
        self._send({"path": sys.path, "verifiers": made})
        try:
            _, _, problem = self._receive(_START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise UserError(
                f"config.rl.rewards: the process that judges answers did not start ({type(error).__name__}); "
                "run the functions of the config file by hand"
            ) from None
        if problem:
            self.kill()
            raise UserError(problem)

    def ask(self, name: str, sample: Sample, seconds: float) -> tuple[float, str]:
        """(value, what is wrong). Raises TimeoutError, or EOFError where the process has ended."""
        self._asked += 1
        self._send([self._asked, name, *sample])
        number, value, problem = self._receive(seconds)
        if number != self._asked:
            raise EOFError
        return (0.0 if value is None else value), problem

    def kill(self) -> int:
        """The status of the process, which is no more, nor is any that it started (in its session)."""
        if self._process.returncode is None:  # else its number may be that of others by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return self._process.wait()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise EOFError from None

    def _receive(self, seconds: float) -> list[Any]:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise TimeoutError
            read = os.read(pipe, 65536)
            if not read:
                raise EOFError
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)
