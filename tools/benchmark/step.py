"""A training step of the 30M Llama: ours, torch + transformers, and the share of the matmul peak that each reaches."""

from typing import Any

from tools.benchmark import timing, train_step
from tools.benchmark.shape import SHAPE, config, transformers_model
from tools.benchmark.timing import THREADS, Values

LABELS = {
    "step:ours": "ours, fp32",
    "step:torch": "torch + transformers, fp32",
    "step:torch_bf16": "torch, bf16 autocast",
}


def measure(rounds: int, steps: int) -> None:
    values = {"steps": steps}
    results = timing.in_turns(["step:matmul", "step:ours", "step:torch"], values, rounds=rounds)
    results |= timing.in_turns(["step:torch_bf16"], values, rounds=1)  # some machines take 20 s a step
    print(f"\ntraining step, {SHAPE}, {THREADS} threads; median of {rounds} interleaved rounds of {steps} steps")
    print(timing.machine("torch", "transformers"))
    peak = timing.median(results["step:matmul"], "flops")
    print(f"  {'matmul peak (fp32)':<28}{peak / 1e9:8.1f} GFLOP/s")
    for name, label in LABELS.items():
        seconds = timing.median(results[name])
        flops = _step_flops() / seconds
        print(
            f"  {label:<28}{flops / 1e9:8.1f} GFLOP/s  {seconds:6.3f} s/step  {flops / peak:5.0%} of peak  "
            f"{timing.ratio(results['step:torch'], results[name])} torch  loss {results[name][-1]['loss']:.4f}"
        )


def _step_flops() -> float:
    """Matmul FLOPs of forward and backward; attention counted for its causal half."""
    s = SHAPE
    weights = s["layers"] * (4 * s["width"] ** 2 + 3 * s["width"] * s["mlp"]) + s["vocab"] * s["width"]
    attention = s["layers"] * 2 * s["width"] * s["length"] / 2
    return 6.0 * (weights + attention) * s["rows"] * s["length"]


def _matmul(values: Values) -> dict[str, Any]:
    """The faster of both libraries' products."""
    import jax
    import jax.numpy as jnp
    import torch

    size, steps = 2048, 4 * values["steps"]
    a, b = (jax.random.normal(jax.random.key(seed), (size, size)) for seed in (0, 1))
    function = jax.jit(jnp.matmul, compiler_options=config().runtime.compiler_options.cpu.to_dict())
    seconds = timing.seconds(lambda: function(a, b).block_until_ready(), steps)
    torch.set_num_threads(THREADS)
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = min(seconds, timing.seconds(lambda: a @ b, steps))
    return {"flops": 2 * size**3 / seconds}


def drawn_tokens() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, SHAPE["vocab"], (SHAPE["rows"], SHAPE["length"] + 1))


def _ours(values: Values) -> dict[str, Any]:
    tokens = drawn_tokens()
    return train_step.ours(config(), {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, values["steps"])


def _torch(values: Values, *, bf16: bool) -> dict[str, Any]:
    import torch

    model, tokens = transformers_model(), drawn_tokens()
    inputs, targets = torch.tensor(tokens[:, :-1]), torch.tensor(tokens[:, 1:])

    def loss() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(inputs, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return train_step.in_torch(model, loss, values["steps"])


WORKERS: dict[str, timing.Worker] = {
    "matmul": _matmul,
    "ours": _ours,
    "torch": lambda values: _torch(values, bf16=False),
    "torch_bf16": lambda values: _torch(values, bf16=True),
}
