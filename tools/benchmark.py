"""Measures this program beside its peers in one run, and prints a table. A measurement, not a test: it asserts nothing.

    python tools/benchmark.py step      a training step of a 30M Llama shape: ours, torch + transformers, matmul peak
    python tools/benchmark.py input     prepare and read rates, beside SeqIO and beside what a step consumes
    python tools/benchmark.py save      how long asynchronous saving stalls the loop
    python tools/benchmark.py imports   import and --help
    python tools/benchmark.py           all of them

Each figure is the median over rounds; the rounds of peers are interleaved, so that a busy machine slows all of them.
Needs the [test] extra (torch and transformers for `step`; `input` leaves SeqIO out where it is not installed).
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The shape of the step benchmark: about 30M parameters.
SHAPE = {"embed": 512, "layers": 8, "heads": 8, "mlp": 1376, "vocab": 8192, "rows": 8, "length": 512}
THREADS = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*SECTIONS, []], help="sections to run (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each peer (default 5)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round (default 5)")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options.steps)))
        return 0
    for name in options.what or SECTIONS:
        SECTIONS[name](options.rounds, options.steps)
    return 0


# A training step.


def benchmark_step(rounds: int, steps: int) -> None:
    names = ("matmul", "ours", "torch", "torch_bf16")
    results: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn == 0 else names[:-1]:  # bf16 once: some machines take 20 s a step
            results[name].append(_child(name, steps))
    print(f"\ntraining step, {SHAPE}, {THREADS} threads; median of {rounds} interleaved rounds of {steps} steps")
    peak = statistics.median(result["flops"] for result in results["matmul"])
    print(f"  {'matmul peak (fp32)':<28}{peak / 1e9:8.1f} GFLOP/s")
    for name in names[1:]:
        seconds = statistics.median(result["seconds"] for result in results[name])
        flops = _step_flops() / seconds
        paired = [
            torch["seconds"] / mine["seconds"] for mine, torch in zip(results[name], results["torch"], strict=False)
        ]
        ratio = statistics.median(paired)
        print(
            f"  {LABELS[name]:<28}{flops / 1e9:8.1f} GFLOP/s  {seconds:6.3f} s/step  {flops / peak:5.0%} of peak  "
            f"{ratio:5.2f}x torch (rounds {min(paired):.2f} to {max(paired):.2f})  loss {results[name][-1]['loss']:.4f}"
        )


LABELS = {"ours": "ours, fp32", "torch": "torch + transformers, fp32", "torch_bf16": "torch, bf16 autocast"}


def _step_flops() -> float:
    """Matmul FLOPs of forward and backward; attention counted for its causal half."""
    s = SHAPE
    weights = s["layers"] * (4 * s["embed"] ** 2 + 3 * s["embed"] * s["mlp"]) + s["vocab"] * s["embed"]
    attention = s["layers"] * 2 * s["embed"] * s["length"] / 2
    return 6.0 * (weights + attention) * s["rows"] * s["length"]


def _time_matmul(steps: int) -> dict:
    """The faster of both libraries' products."""
    import jax
    import jax.numpy as jnp
    import torch

    from configs import common

    size = 2048
    a, b = (jax.random.normal(jax.random.key(seed), (size, size)) for seed in (0, 1))
    function = jax.jit(jnp.matmul, compiler_options=common.config().runtime.compiler_options.cpu.to_dict())
    seconds = _seconds(lambda: function(a, b).block_until_ready(), 4 * steps)
    torch.set_num_threads(THREADS)
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = min(seconds, _seconds(lambda: a @ b, 4 * steps))
    return {"flops": 2 * size**3 / seconds}


def _time_ours(steps: int) -> dict:
    from t5x_like.core import environment

    environment.restart_without_tcache()  # as `t5x_like train` does
    import jax
    import numpy as np

    from configs import common
    from t5x_like.core import config as bridge
    from t5x_like.parallel import mesh as meshes
    from t5x_like.runs import program as programs
    from t5x_like.runs import train as experiments

    config = common.config()
    environment.apply(bridge.build(environment.RuntimeConfig, config.runtime, path="config.runtime"))
    s = SHAPE
    # Layers one by one rather than scanned: on a CPU that spares copies into stacked arrays (docs/log.md).
    config.model.update({"family": "llama", "size": "mini", "vocab_size": s["vocab"], "scan": False})
    config.data.update({"batch_size": s["rows"], "length": s["length"], "attend_across_documents": True})
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        state, frozen = programs.initialize(program, seed=0)
        tokens = np.random.default_rng(0).integers(0, s["vocab"], (s["rows"], s["length"] + 1)).astype(np.int32)
        batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in program.batch.items()}
        batch |= {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        batch["positions"] = np.tile(np.arange(s["length"], dtype=np.int32), (s["rows"], 1))
        batch = {name: jax.device_put(value, program.batch[name].sharding) for name, value in batch.items()}
        carry = [state]
        losses = []

        def step() -> None:
            carry[0], metrics = program.step(carry[0], frozen, batch)
            losses.append(float(metrics["loss"]))

        return {"seconds": _seconds(step, steps), "loss": losses[0]}


def _time_torch(steps: int, *, bf16: bool = False) -> dict:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    s = SHAPE
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=s["embed"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"],
            intermediate_size=s["mlp"],
            vocab_size=s["vocab"],
            max_position_embeddings=s["length"],
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-6, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    tokens = np.random.default_rng(0).integers(0, s["vocab"], (s["rows"], s["length"] + 1))
    inputs, targets = torch.tensor(tokens[:, :-1]), torch.tensor(tokens[:, 1:])
    losses = []

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return {"seconds": _seconds(step, steps), "loss": losses[0]}


# Preparing and reading.

TEXT = ROOT / "configs/data/tinyshakespeare/input.txt"
COPIES = 15  # of its 1.1 MB, so that starting does not dominate
PREPARED = {  # row: (source, tokenizer, workers)
    "lines, BPE, 1 worker": ("lines", "bpe", 1),
    "lines, BPE, 2 workers": ("lines", "bpe", 2),
    "whole files, BPE, 1 worker": ("text", "bpe", 1),
    "lines, SentencePiece, 1 worker": ("lines", "sentencepiece", 1),
}
SEQIO_LINES = 4000
SEQIO_TASK = """
import os
import seqio

FOLDER = os.path.dirname(__file__)
VOCABULARY = seqio.SentencePieceVocabulary(os.path.join(FOLDER, "tokenizer.model"))
seqio.TaskRegistry.add(
    "lines",
    source=seqio.TextLineDataSource({"train": os.path.join(FOLDER, "lines.txt")}),
    preprocessors=[
        lambda data: data.map(lambda line: {"targets": line}),
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos,
    ],
    output_features={"targets": seqio.Feature(VOCABULARY, add_eos=True)},
)
"""


def benchmark_input(rounds: int, steps: int) -> None:
    rounds = min(rounds, 3)
    with_seqio = importlib.util.find_spec("seqio") is not None
    native, seqio, trained = [], [], []
    for turn in range(rounds):
        native.append(_child("prepare", steps))
        seqio += [_child("seqio", steps)] if with_seqio else []
        trained += [_child("ours", 1)] if turn == 0 else []  # the ratio is in the thousands
    text = f"{COPIES} times tinyshakespeare ({COPIES * TEXT.stat().st_size / 1e6:.1f} MB), {SHAPE['vocab']} tokens"
    print(f"\nprepare, {text}; median of {rounds} rounds: MB of text per second, for each worker, per second of CPU")
    for row, (_, _, workers) in PREPARED.items():
        _print_rates(row, [result["prepare"][row] for result in native], workers)
    for row in seqio[0] if seqio else ():
        _print_rates(row, [result[row] for result in seqio], 1)
    if not with_seqio:
        print("  SeqIO is not installed, so its rows are left out; pip install 't5x_like[data]'")
    length, read = SHAPE["length"], statistics.median(result["read"] for result in native)
    consumed = SHAPE["rows"] / trained[0]["seconds"]
    print(f"\nreading, batches of {SHAPE['rows']} rows of {length} tokens with their segments, one thread")
    print(f"  {'read':<40}{read:9.1f} rows/s  {read * length:11.0f} tokens/s")
    print(f"  {'consumed by a training step':<40}{consumed:9.1f} rows/s  {consumed * length:11.0f} tokens/s")
    print(f"  {'ratio':<40}{read / consumed:9.0f}x")


def _print_rates(row: str, results: list[dict], workers: int) -> None:
    wall, cpu = (statistics.median(each["bytes"] / each[key] / 1e6 for each in results) for key in ("wall", "cpu"))
    print(f"  {row:<40}{wall:7.3f} MB/s  {wall / workers:7.3f} a worker  {cpu:7.3f} per CPU second")


def _time_prepare(steps: int) -> dict:
    """{"prepare": {row: seconds and bytes}, "read": rows per second}."""
    import numpy as np

    from t5x_like.commands import prepare
    from t5x_like.runs import arguments, training_run
    from t5x_like.runs import train as experiments

    with tempfile.TemporaryDirectory() as name:
        folder, text, results = pathlib.Path(name), TEXT.read_text(), {}
        (folder / "lines-0.txt").write_text(text * COPIES)
        for copy in range(COPIES):
            (folder / f"text-{copy}.txt").write_text(text)
        for kind in ("bpe", "sentencepiece"):
            _train_tokenizer(kind, folder / kind)
        for row, (kind, tokenizer, workers) in PREPARED.items():
            data = {"source": f"{kind}:{folder}/{kind}-*.txt", "tokenizer": f"{folder}/{tokenizer}", "validation": ""}
            data |= {"workers": workers, "cache": f"{folder}/{row}", "attend_across_documents": False}
            data |= {"batch_size": SHAPE["rows"], "length": SHAPE["length"]}
            chosen = _config({f"data.{field}": value for field, value in data.items()})
            results[row] = _spent(lambda chosen=chosen: prepare.run(chosen), COPIES * TEXT.stat().st_size)
        experiment = experiments.from_config(arguments.load_config(chosen)[0])
        read = training_run.open_data(experiment.data, cache_dir=experiment.data.cache, seed=0)
        rows, number = np.arange(SHAPE["rows"]), itertools.count()
        batches = 200
        seconds = _seconds(lambda: [read.rows(next(number), rows) for _ in range(batches)], steps)
    return {"prepare": results, "read": batches * SHAPE["rows"] / seconds}


def _time_seqio(steps: int) -> dict:
    """SeqIO's own iteration of some of these lines, and `prepare` of the same Task, which starts TensorFlow."""
    del steps
    import seqio

    from t5x_like.commands import prepare

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _train_tokenizer("sentencepiece", folder)
        size = (folder / "lines.txt").write_text("".join(TEXT.open().readlines()[:SEQIO_LINES]))
        (folder / "task.py").write_text(SEQIO_TASK)
        runpy.run_path(str(folder / "task.py"))

        def examples() -> Iterator[object]:
            task = seqio.get_mixture_or_task("lines")
            return task.get_dataset(sequence_length=None, split="train", shuffle=False).as_numpy_iterator()

        next(examples())
        data = {"source": f"seqio:{folder}/task.py:lines", "tokenizer": "task", "validation": "", "workers": 1}
        chosen = _config({f"data.{field}": value for field, value in data.items()})
        return {
            f"SeqIO alone, {SEQIO_LINES} of these lines": _spent(lambda: list(examples()), size),
            "prepare of it, with TensorFlow's start": _spent(lambda: prepare.run([*chosen, f"--workdir={name}"]), size),
        }


def _train_tokenizer(kind: str, output: pathlib.Path) -> None:
    from t5x_like.commands import train_tokenizer

    train_tokenizer.run([f"lines:{TEXT}", f"--kind={kind}", f"--size={SHAPE['vocab']}", f"--output={output}"])


def _config(overrides: Mapping[str, object]) -> list[str]:
    """Arguments: the example of `make train`, changed."""
    return ["--config=configs/pretrain/tiny.py", *(f"--config.{field}={value}" for field, value in overrides.items())]


def _spent(function: Callable[[], object], size: int) -> dict:
    """What `function` takes for `size` bytes: seconds of wall clock, and of CPU with those of its ended children."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    wall_before, cpu_before = time.perf_counter(), cpu()
    function()
    return {"bytes": size, "wall": time.perf_counter() - wall_before, "cpu": cpu() - cpu_before}


# Saving.

SAVE_EVERY = 8  # steps; long enough for the save before to be written
REALISTIC_EVERY = 100
SAVED_RUN = {
    "data.batch_size": 2,  # the state is what counts
    "data.length": SHAPE["length"],
    "model.layers": SHAPE["layers"],
    "model.embed": SHAPE["embed"],
    "model.heads": SHAPE["heads"],
    "model.kv_heads": SHAPE["heads"],
    "model.head": SHAPE["embed"] // SHAPE["heads"],
    "model.mlp": SHAPE["mlp"],
    "model.vocab_size": SHAPE["vocab"],
    "model.tie_embeddings": False,
    "model.scan": False,
    "data.tokenizer": f"train:bpe:{SHAPE['vocab']}",
    "data.validation": "",
    "optim.name": "adamw",
    "optim.learning_rate": 3e-4,
    "evaluate.every_steps": 0,
    "loop.log_every_steps": 1,
    "checkpoint.every_steps": SAVE_EVERY,
    "telemetry.measure_cpu_peak": False,
}


def benchmark_save(rounds: int, steps: int) -> None:
    del steps
    result = _child("save", rounds + 1)
    first, later, step = result["stalls"][0], result["stalls"][1:], result["step_seconds"]
    stall = statistics.median(later)
    print(f"\nasynchronous saves of {result['bytes']} bytes of state, every {SAVE_EVERY} steps of {step:.2f} s")
    print(f"  {'the loop waits':<40}{stall:6.2f} s a save (median of {len(later)}), {first:.2f} s at the first")
    for every in (SAVE_EVERY, REALISTIC_EVERY):
        between = f"a save every {every} steps ({every * step / 60:.1f} min)"
        print(f"  {between:<40}{stall / (every * step + stall):6.2%} of the time the loop waits")


def _time_saves(saves: int) -> dict:
    """Trains with a save every few steps. A stall is what lies between two rows beyond the seconds of the step."""
    import numpy as np

    from t5x_like.commands import train
    from t5x_like.core.metrics import read_rows

    steps = saves * SAVE_EVERY + 2
    with tempfile.TemporaryDirectory() as workdir:
        train.run([*_config(SAVED_RUN | {"loop.steps": steps}), f"--workdir={workdir}"])
        rows = {row["step"]: row for row in read_rows(f"{workdir}/metrics.jsonl")}
        arrays = json.loads(pathlib.Path(workdir, f"checkpoints/{steps}/metadata/metadata").read_text())["arrays"]
    leaves = [leaf for item in arrays.values() for leaf in item.values()]
    spent = [rows[step]["train/step_seconds"] for step in range(1, steps + 1)]
    return {
        "bytes": sum(int(np.prod(leaf["shape"])) * np.dtype(leaf["dtype"]).itemsize for leaf in leaves),
        "step_seconds": statistics.median(spent),
        "stalls": [
            rows[step + 1]["time"] - rows[step]["time"] - spent[step] for step in range(SAVE_EVERY, steps, SAVE_EVERY)
        ],
    }


# Import time.


def benchmark_imports(rounds: int, steps: int) -> None:
    del steps
    commands = {
        "import t5x_like": [sys.executable, "-c", "import t5x_like"],
        "t5x_like --help": [sys.executable, "-m", "t5x_like", "--help"],
        "import jax": [sys.executable, "-c", "import jax"],
    }
    print(f"\nstart of a process, median of {rounds}")
    for name, command in commands.items():
        seconds = statistics.median(_wall(command) for _ in range(rounds))
        print(f"  {name:<28}{seconds:6.2f} s")


def _wall(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def _seconds(function: Callable[[], object], steps: int) -> float:
    """Median seconds of one call, after two that are not counted."""
    for _ in range(2):
        function()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _child(worker: str, steps: int) -> dict:
    """One round in a process of its own, since thread pools of two frameworks disturb each other."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": str(THREADS), "OMP_NUM_THREADS": str(THREADS)}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, f"--worker={worker}", f"--steps={steps}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{result.stderr}\nbenchmark: the worker {worker} failed with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


WORKERS: dict[str, Callable[[int], dict]] = {
    "matmul": _time_matmul,
    "ours": _time_ours,
    "torch": _time_torch,
    "torch_bf16": lambda steps: _time_torch(steps, bf16=True),
    "prepare": _time_prepare,
    "seqio": _time_seqio,
    "save": _time_saves,
}
SECTIONS: dict[str, Callable[[int, int], None]] = {
    "step": benchmark_step,
    "input": benchmark_input,
    "save": benchmark_save,
    "imports": benchmark_imports,
}

if __name__ == "__main__":
    sys.exit(main())
