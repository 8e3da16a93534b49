"""How all measurements are taken: rounds of peers in turns, each in a process of its own; medians; and the machine.

A worker is a function of a measurement's file, `WORKERS["ours"](values) -> result`, of plain JSON values. Thread pools
of two frameworks disturb each other, hence the processes; a busy machine slows all peers of a round alike, so that the
ratio of a pair is steadier than either of its times.
"""

import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5x_like.core import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
THREADS = 2
Values = Mapping[str, Any]
Worker = Callable[[Values], dict[str, Any]]


def run_worker(worker: str, values: Values) -> dict[str, Any]:
    """The result of `FILE:NAME` in a new process with `THREADS` threads."""
    threads = str(THREADS)
    variables = {"JAX_PLATFORMS": "cpu", "NPROC": threads, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.benchmark", f"--worker={worker}", f"--values={json.dumps(values)}"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stderr}\nbenchmark: the worker {worker} failed with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def answer(worker: str, values: Values) -> None:
    """What the new process does: the last line that it prints is its result."""
    file, name = worker.split(":")
    if name not in ("torch", "transformers"):
        environment.restart_without_tcache()  # as the command line does
    print(json.dumps(importlib.import_module(f"tools.benchmark.{file}").WORKERS[name](values)))


def in_turns(workers: Sequence[str], values: Values, *, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The results of each worker, one a round; within a round one worker after the other."""
    results: dict[str, list[dict[str, Any]]] = {worker: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            results[worker].append(run_worker(worker, values))
    return results


def seconds(function: Callable[[], object], steps: int, *, warmup: int = 2) -> float:
    """Median seconds of one call, after those that are not counted."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def spent(function: Callable[[], object]) -> dict[str, float]:
    """What one call takes: seconds of wall clock, and of CPU with those of its ended children."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    wall_before, cpu_before = time.perf_counter(), cpu()
    function()
    return {"wall": time.perf_counter() - wall_before, "cpu": cpu() - cpu_before}


def median(results: Sequence[Values], field: str = "seconds") -> float:
    return statistics.median(result[field] for result in results)


def ratio(numerators: Sequence[Values], denominators: Sequence[Values], field: str = "seconds") -> str:
    """The median over rounds of one result's field to the other's, and the least and greatest round."""
    paired = [a[field] / b[field] for a, b in zip(numerators, denominators, strict=False)]
    return f"{statistics.median(paired):5.2f}x (rounds {min(paired):.2f} to {max(paired):.2f})"


def machine(*packages: str) -> str:
    """One line: date, processor, cores, load and versions."""
    versions = []
    for name in ("jax", *packages):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    return (
        f"  {datetime.date.today()}, {_processor()}, {cores} cores, load {load}; Python "
        f"{platform.python_version()}, {', '.join(versions)}"
    )


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
