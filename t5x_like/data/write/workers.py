"""Worker processes of `prepare`: a pool that hands out jobs, and the program that each worker runs.

A worker is `python -m t5x_like.data.write.workers`: it reads one JSON job a line and answers with JSON lines. It is a
process of its own (not a fork, nor multiprocessing's re-import of the caller's main module), so TensorFlow, which
SeqIO needs, lives and dies there, with JAX and CUDA kept off the accelerator.
"""

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from t5x_like.core.errors import UserError
from t5x_like.data.write import encoding, tasks

FUNCTIONS: dict[str, Callable[[dict[str, Any], encoding.Report], Any]] = {
    "encode_shards": encoding.encode_shards,
    "describe_task": tasks.describe,
    "task_rates": tasks.rates,
    "encode_task_shard": tasks.encode_shard,
}
_REPORT_SECONDS = 0.2


class Pool:
    """At most `size` workers, started when needed and ended with the pool. Use as a context manager."""

    def __init__(self, size: int):
        self._size = size
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.end()

    def run(self, function: str, jobs: Sequence[dict[str, Any]], report: Callable[[int, int], None]) -> list[Any]:
        """Results in the order of the jobs; `report` gets (job, amount done). After an error no job is begun."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            todo.put(index)
        results: list[Any] = [None for _ in jobs]
        errors: list[BaseException] = []
        lock, stopped = threading.Lock(), threading.Event()

        def reported(index: int, amount: int) -> None:
            with lock:
                report(index, amount)

        def drive(worker: _Worker) -> None:
            try:
                while not stopped.is_set():
                    index = todo.get_nowait()
                    results[index] = worker.run(function, jobs[index], functools.partial(reported, index))
            except queue.Empty:
                pass
            except BaseException as error:  # handed to the caller's thread below
                errors.append(error)
                stopped.set()
            if worker.alive():
                self._idle.append(worker)

        threads = [threading.Thread(target=drive, args=(w,), daemon=True) for w in self._workers(len(jobs))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            time.sleep(0.01)
        if errors:
            raise errors[0]
        return results

    def _workers(self, jobs: int) -> list["_Worker"]:
        count = min(self._size, jobs)
        workers, self._idle = self._idle[:count], self._idle[count:]
        while len(workers) < count:
            workers.append(_Worker())
            self._all.append(workers[-1])
        return workers


class _Worker:
    def __init__(self) -> None:
        paths = [os.path.abspath(path) for path in sys.path if not path.endswith(".zip")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "t5x_like.data.write.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )

    def run(self, function: str, job: dict[str, Any], report: encoding.Report) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps({"function": function, "job": job}).encode() + b"\n")
            stdin.flush()
            for line in stdout:
                answer = json.loads(line)
                if "done" in answer:
                    report(answer["done"])
                elif "error" in answer:
                    raise UserError(answer["error"])
                elif "defect" in answer:
                    raise RuntimeError(f"in a worker process:\n{answer['defect']}")
                else:
                    return answer["result"]
        except BrokenPipeError:
            pass
        raise UserError(f"a prepare worker ended ({self._status()}) at {_describe(job)}; start again: shards are kept")

    def _status(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return f"signal {-code}" if code < 0 else f"status {code}: {last[0]}"

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # of a job that it died without reading
                    stream.close()


def _describe(job: dict[str, Any]) -> str:
    return f"shard {job['index']} of {job['folder']}" if "index" in job else str(job.get("source", ""))


def main(lines: Iterator[bytes], answers: IO[bytes]) -> None:
    """The worker's loop: ends when the parent closes the pipe or has died."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    for line in lines:
        request = json.loads(line)
        done, reported = 0, time.monotonic()

        def report(amount: int) -> None:
            nonlocal done, reported
            done += amount
            if time.monotonic() - reported > _REPORT_SECONDS:
                answer({"done": done})
                done, reported = 0, time.monotonic()

        try:
            result = FUNCTIONS[request["function"]](request["job"], report)
            answer({"done": done})
            answer({"result": result})
        except UserError as error:
            answer({"error": str(error)})
        except Exception:
            answer({"defect": traceback.format_exc()})


if __name__ == "__main__":
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a SeqIO module prints is no answer
    main(iter(sys.stdin.buffer.readline, b""), private)
