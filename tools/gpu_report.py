"""One table of what this program does on a GPU: its GPU tests, MFU of training, decoding, transformers beside it.

    make gpu-wheels                          here, with a network: what a bare image lacks, into build/gpu-wheels
    python -m tools.gpu_report --output=DIR  there, without one: at most 9 minutes, DIR/gpu_report.md and a log a part

For an image with CUDA, Python 3.12, jax, flax, optax and torch. Every part runs in a process of its own, with a time
limit of its own; a part that fails or is ended is one line of the table, and the others still report. Decoding counts
prompts too: its time is that of `generate` as a whole. Exit status 1 if a part failed.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tools.gpu_work import ROOT, WORK

WHEELS = ROOT / "build/gpu-wheels"
SECONDS = 9 * 60
# "1b" is Llama 3.2 1B, for the report; "tiny" tries the program out where there is no GPU.
# grpo: prompts, answers to each, new tokens, micro-batches of the update.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": {
        "size": "3_2_1b",
        "rows": 8,
        "length": 2048,
        "packed": (2, 8192),
        "remat": "minimal",
        "decode": (1, 16, 64),
        "new": 128,
        "grpo": (16, 16, 256, 4),
    },
    "tiny": {
        "size": "tiny",
        "rows": 8,
        "length": 64,
        "packed": (8, 64),
        "remat": "minimal",
        "decode": (1, 2),
        "new": 8,
        "grpo": (2, 4, 8, 1),
    },
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One process. seconds: its limit. rows(result): lines of the table, (what, value)."""

    title: str
    seconds: int
    command: Callable[[str], list[str]]
    rows: Callable[[Mapping[str, Any]], list[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """result: what the process printed last, as JSON. failure: one line, empty if there is none."""

    result: Mapping[str, Any]
    failure: str
    seconds: float


Runner = Callable[[list[str], float], tuple[int | None, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder for gpu_report.md and a log of each part")
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="model to time (default: Llama 3.2 1B)")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--work", choices=list(WORK), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        print(json.dumps(WORK[options.work](SHAPES[options.shape])))
        return 0
    begin = time.monotonic()
    site = options.output / "site" if options.output else ROOT / "build/gpu-site"
    note = install_missing(WHEELS, site)
    outcomes = {}
    for name in options.parts:
        outcomes[name] = attempt(
            PARTS[name],
            options.shape,
            left=SECONDS - (time.monotonic() - begin),
            run=_runner(options.output, name, site),
        )
        print(
            f"{name}: {outcomes[name].failure or 'done'} ({outcomes[name].seconds:.0f} s)", file=sys.stderr, flush=True
        )
    text = table(outcomes, heading=_heading(options.shape, note))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "gpu_report.md").write_text(text)
    print(text)
    return 1 if any(outcome.failure or outcome.result.get("failed") for outcome in outcomes.values()) else 0


def attempt(part: Part, shape: str, *, left: float, run: Runner) -> Outcome:
    """Runs a part for at most its limit or what is left of the whole; a failure is a line, never an exception."""
    limit = min(part.seconds, left)
    if limit < 1:
        return Outcome({}, f"not started: the {SECONDS} s of the report were spent", 0.0)
    begin = time.monotonic()
    status, output = run(part.command(shape), limit)
    spent = time.monotonic() - begin
    lines = [line for line in output.splitlines() if line.strip()]
    if status is None:
        return Outcome({}, f"ended after its limit of {limit:.0f} s", spent)
    if status != 0:
        return Outcome({}, f"status {status}: {_reason(lines)}", spent)
    try:
        return Outcome(json.loads(lines[-1]), "", spent)
    except (IndexError, ValueError):
        return Outcome({}, f"no result in its output: {lines[-1][:200] if lines else 'nothing'}", spent)


def _reason(lines: Sequence[str]) -> str:
    """The line that says most: the last one that names an error, else the last."""
    named = [line for line in lines if re.search(r"Error|error:|FAILED|RESOURCE_EXHAUSTED", line)]
    return (named or list(lines) or ["no output"])[-1].strip()[:200]


def table(outcomes: Mapping[str, Outcome], *, heading: str) -> str:
    """The report in markdown."""
    lines = [heading, "", "| part | what | value |", "|---|---|---|"]
    for name, outcome in outcomes.items():
        part = PARTS[name]
        rows = [("failed", outcome.failure)] if outcome.failure else part.rows(outcome.result)
        for what, value in [*rows, ("time of this part", f"{outcome.seconds:.0f} s")]:
            lines.append(f"| {part.title} | {_cell(what)} | {_cell(value)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _heading(shape: str, note: str) -> str:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch")
    found = {distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return (
        f"{datetime.date.today()}, Python {platform.python_version()}, {versions}. Shape {shape}: "
        f"{json.dumps(SHAPES[shape])}. {note}"
    )


# What a bare image lacks.


def install_missing(wheels: pathlib.Path, site: pathlib.Path) -> str:
    """Unpacks into `site` the wheels whose distribution is not installed. Returns what was done, in words."""
    missing = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _is_installed(wheel.name.split("-")[0])]
    if not missing:
        return "All packages were there."
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    result = subprocess.run([*command, *map(str, missing)], capture_output=True, text=True, timeout=60)
    names = ", ".join(wheel.name.split("-")[0] for wheel in missing)
    if result.returncode:
        return f"Not installed: {names}: {_reason(result.stderr.splitlines())}"
    return f"From wheels: {names}."


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _runner(output: pathlib.Path | None, name: str, site: pathlib.Path) -> Runner:
    """Runs a command in a process group of its own, which ends whole at the limit: (status or None, all output)."""

    def run(command: list[str], limit: float) -> tuple[int | None, str]:
        paths = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            text, status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, status = process.communicate()[0], None
        if output:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{name}.log").write_text(text)
        return status, text

    return run


# What is said of a result.


def _test_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = ", ".join(f"{count} {word}" for word, count in result["counts"].items())
    return [("pytest -m gpu", counts), *(("failed", name) for name in result["failed"])]


def _train_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    flops = result["flops"] / result["seconds"]
    peak = result["peak"]
    share = f"{flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else f"the peak of {result['device']} is unknown"
    return [
        ("device", result["device"]),
        ("step", f"{result['seconds']:.4f} s, {result['tokens'] / result['seconds']:.0f} tokens/s"),
        ("MFU, bf16", f"{flops / 1e12:.2f} TFLOP/s, {share}"),
        ("first step, compiling", f"{result['first']:.0f} s; its loss {result['loss']:.3f}"),
    ]


def _step_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("step", f"{result['seconds']:.4f} s, {result['tokens'] / result['seconds']:.0f} tokens/s")]


def _decode_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rates = result["tokens_per_second"].items()
    return [
        ("parameters", f"{result['parameters'] / 1e9:.2f}e9"),
        *((f"{rows} rows", f"{rate:.0f} tokens/s") for rows, rate in rates),
    ]


def _grpo_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    whole = result["seconds"]
    return [
        (
            "iteration",
            f"{whole:.2f} s, {result['answers'] / whole:.1f} answers/s, {result['tokens'] / whole:.0f} tokens/s",
        ),
        *((part, f"{result[part] / whole:.0%}") for part in ("rollout", "reward", "scoring", "update")),
    ]


def _worker(name: str) -> Callable[[str], list[str]]:
    return lambda shape: [sys.executable, "-m", "tools.gpu_report", f"--work={name}", f"--shape={shape}"]


# The limits and the minute of unpacking wheels are the 9 minutes.
PARTS: Mapping[str, Part] = {
    "train": Part("training", 50, _worker("train"), _train_rows),
    "lora": Part("training, LoRA of rank 16", 35, _worker("lora"), _step_rows),
    "decode": Part("decoding", 50, _worker("decode"), _decode_rows),
    "grpo": Part("GRPO", 60, _worker("grpo"), _grpo_rows),
    "train_torch": Part("training, transformers", 35, _worker("train_torch"), _step_rows),
    "decode_torch": Part("decoding, transformers", 45, _worker("decode_torch"), _decode_rows),
    "packed": Part("training, four documents a row", 35, _worker("packed"), _train_rows),
    "tests": Part("GPU tests", 170, _worker("tests"), _test_rows),
}

if __name__ == "__main__":
    sys.exit(main())
