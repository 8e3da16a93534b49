"""Measures this program beside its peers in one run, and prints a table. A measurement, not a test: it asserts nothing.

    python tools/benchmark.py step      a training step of a 30M Llama shape: ours, torch + transformers, matmul peak
    python tools/benchmark.py input     prepare and read rates, beside SeqIO and beside what a step consumes
    python tools/benchmark.py save      how long asynchronous saving stalls the loop
    python tools/benchmark.py imports   import and --help
    python tools/benchmark.py           all of them

Each figure is the median over rounds; the rounds of peers are interleaved, so that a busy machine slows all of them.
Needs the [test] extra (torch, transformers; seqio for `input`).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

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
    import jax
    import numpy as np

    from configs import common
    from t5x_like import experiment as experiments
    from t5x_like.core import config as bridge
    from t5x_like.core import environment
    from t5x_like.parallel import mesh as meshes

    config = common.config()
    environment.apply(bridge.build(environment.RuntimeConfig, config.runtime, path="config.runtime"))
    s = SHAPE
    # Layers one by one rather than scanned: on a CPU that spares copies into stacked arrays (docs/log.md).
    config.model.update({"family": "llama", "size": "mini", "vocab_size": s["vocab"], "scan": False})
    config.data.update({"batch_size": s["rows"], "length": s["length"], "attend_across_documents": True})
    experiment = experiments.from_config(config)
    mesh = meshes.make(experiment.mesh)
    with jax.set_mesh(mesh):
        program = experiments.build_program(experiment, mesh)
        state, frozen = experiments.initialize(program, seed=0)
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
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


WORKERS: dict[str, Callable[[int], dict]] = {
    "matmul": _time_matmul,
    "ours": _time_ours,
    "torch": _time_torch,
    "torch_bf16": lambda steps: _time_torch(steps, bf16=True),
}
SECTIONS: dict[str, Callable[[int, int], None]] = {"step": benchmark_step, "imports": benchmark_imports}

if __name__ == "__main__":
    sys.exit(main())
