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
import functools
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

ROOT = pathlib.Path(__file__).resolve().parents[1]
WHEELS = ROOT / "build/gpu-wheels"
SECONDS = 9 * 60
# "1b" is Llama 3.2 1B, for the report; "tiny" tries the program out where there is no GPU.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1b": {
        "size": "3_2_1b",
        "rows": 8,
        "length": 2048,
        "packed": (2, 8192),
        "remat": "minimal",
        "decode": (1, 16, 64),
        "new": 128,
    },
    "tiny": {
        "size": "tiny",
        "rows": 8,
        "length": 64,
        "packed": (8, 64),
        "remat": "minimal",
        "decode": (1, 2),
        "new": 8,
    },
}
STEPS = 8


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


# What the processes do.


def _gpu_tests(shape: Mapping[str, Any]) -> dict[str, Any]:
    """pytest over the files that hold tests for a GPU."""
    del shape
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    environment = os.environ | {"T5X_LIKE_TEST_PLATFORM": "cuda"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(result.stdout, result.stderr, sep="\n")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", result.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if not counts:
        raise SystemExit(f"Error: pytest ran no test, status {result.returncode}")
    return {"counts": counts, "failed": failed}


def _train(shape: Mapping[str, Any], *, rank: int = 0) -> dict[str, Any]:
    """A training step of the config's own program, on random tokens; with a rank, of LoRA on every matrix."""
    import numpy as np

    from configs import common
    from tools.benchmark import train_step

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"], "remat": shape["remat"]})
    config.model.dtype.compute = "bfloat16"
    config.data.update({"batch_size": shape["rows"], "length": shape["length"], "attend_across_documents": True})
    if rank:
        config.adapter.name = "lora"
        config.adapter.lora.update({"rank": rank, "alpha": 2.0 * rank, "targets": (".*",)})
        config.checkpoint.init_from = "not read: parameters are drawn"
    tokens = np.random.default_rng(0).integers(0, 512, (shape["rows"], shape["length"] + 1))
    measured = train_step.ours(config, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, STEPS)
    return measured | {"tokens": shape["rows"] * shape["length"], **_device()}


def _packed(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The same in longer rows, in each of which four documents are kept apart."""
    import numpy as np

    from configs import common
    from tools.benchmark import train_step

    rows, length = shape["packed"]
    document = length // 4
    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"], "remat": shape["remat"]})
    config.model.dtype.compute = "bfloat16"
    config.data.update({"batch_size": rows, "length": length, "attend_across_documents": False})
    tokens = np.random.default_rng(0).integers(0, 512, (rows, length + 1))
    places = np.broadcast_to(np.arange(length), (rows, length))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch |= {"segment_ids": places // document + 1, "positions": places % document}
    measured = train_step.ours(config, batch, STEPS)
    return measured | {"tokens": rows * length, **_device()}


def _torch_model(shape: Mapping[str, Any], **options: Any) -> Any:
    """transformers' Llama of the same numbers on the GPU, with random weights."""
    import torch
    import transformers

    from configs import common
    from t5x_like.convert.families.llama import settings
    from t5x_like.models import config as model_config

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"]})
    numbers = settings(model_config.resolve(config.model))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**numbers), **options)


def _train_torch(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The same step by transformers and torch: float32 weights, bfloat16 by autocast, layers checkpointed."""
    import torch

    from tools.benchmark import train_step

    model = _torch_model(shape, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    tokens = torch.randint(0, 512, (shape["rows"], shape["length"]), device=model.device)

    def loss() -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return train_step.in_torch(model, loss, STEPS) | {"tokens": shape["rows"] * shape["length"]}


def _decode_torch(shape: Mapping[str, Any]) -> dict[str, Any]:
    """`generate` of transformers on such prompts, bfloat16."""
    import torch

    from tools.benchmark import timing

    model = _torch_model(shape, dtype=torch.bfloat16).eval()
    rates = {}
    for rows in shape["decode"]:
        prompts = torch.randint(0, 512, (rows, shape["new"]), device=model.device)

        @torch.inference_mode()
        def run(prompts: Any = prompts) -> object:
            text = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=shape["new"],
                min_new_tokens=shape["new"],
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            return text.cpu()

        rates[str(rows)] = rows * shape["new"] / timing.seconds(run, 3, warmup=1)
    return {"tokens_per_second": rates, "parameters": sum(value.numel() for value in model.parameters())}


def _decode(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy text after prompts of as many random tokens; matrices in bfloat16."""
    from t5x_like.core import environment

    environment.apply(environment.READING)
    import jax
    import numpy as np

    from configs import common
    from t5x_like.inference.decode import generate
    from t5x_like.inference.sampling import GREEDY
    from t5x_like.inference.weights import serving_params
    from t5x_like.models import config as model_config
    from t5x_like.runs import roles
    from tools.benchmark import timing

    config = common.config()
    config.model.update({"family": "llama", "size": shape["size"]})
    config.model.dtype.compute = "bfloat16"
    device = _device()
    model = roles.build_model(model_config.resolve(config.model), rules="", platform=device["platform"])
    params = jax.jit(lambda key: serving_params(model, model.init(key)))(jax.random.key(0))
    rates = {}
    for rows in shape["decode"]:
        prompts = np.random.default_rng(0).integers(0, 512, (rows, shape["new"])).tolist()

        def run(prompts: Any = prompts) -> object:
            return generate(model, params, prompts, max_new_tokens=shape["new"], sampling=GREEDY, seed=0, stop_id=None)

        rates[str(rows)] = rows * shape["new"] / timing.seconds(run, 3, warmup=1)
    return {"tokens_per_second": rates, "parameters": model.parameter_count(), **device}


def _device() -> dict[str, Any]:
    import jax

    from t5x_like.training.peaks import device_peak

    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "peak": device_peak(device.device_kind)}


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


def _worker(name: str) -> Callable[[str], list[str]]:
    return lambda shape: [sys.executable, "-m", "tools.gpu_report", f"--work={name}", f"--shape={shape}"]


WORK: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "tests": _gpu_tests,
    "train": _train,
    "lora": functools.partial(_train, rank=16),
    "decode": _decode,
    "packed": _packed,
    "train_torch": _train_torch,
    "decode_torch": _decode_torch,
}
# The limits and the minute of unpacking wheels are the 9 minutes.
PARTS: Mapping[str, Part] = {
    "train": Part("training", 60, _worker("train"), _train_rows),
    "lora": Part("training, LoRA of rank 16", 40, _worker("lora"), _step_rows),
    "decode": Part("decoding", 60, _worker("decode"), _decode_rows),
    "train_torch": Part("training, transformers", 40, _worker("train_torch"), _step_rows),
    "decode_torch": Part("decoding, transformers", 60, _worker("decode_torch"), _decode_rows),
    "packed": Part("training, four documents a row", 40, _worker("packed"), _train_rows),
    "tests": Part("GPU tests", 180, _worker("tests"), _test_rows),
}

if __name__ == "__main__":
    sys.exit(main())
