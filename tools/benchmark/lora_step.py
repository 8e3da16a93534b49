"""A training step of the 30M Llama: all parameters, LoRA on queries and values (peft's usual targets of a Llama) and on
every matrix of the layers; time and memory of each."""

from typing import Any

from tools.benchmark import timing, train_step
from tools.benchmark.shape import SHAPE, config
from tools.benchmark.step import drawn_tokens
from tools.benchmark.timing import THREADS, Values

RANK = 8
TARGETS = {"few": (".*/attention/(q|v)",), "every": (".*",)}
LABELS = {
    "lora_step:ours": "all parameters",
    "lora_step:few": f"LoRA of q and v, rank {RANK}",
    "lora_step:every": f"LoRA of every matrix, rank {RANK}",
}


def measure(rounds: int, steps: int) -> None:
    results = timing.in_turns([*LABELS], {"steps": steps}, rounds=rounds)
    full = results["lora_step:ours"]
    print(f"\ntraining step, {SHAPE}, {THREADS} threads; median of {rounds} interleaved rounds of {steps} steps")
    print(timing.machine())
    for name, label in LABELS.items():
        last = results[name][-1]
        held = {part: last[part] / full[-1][part] for part in ("gradients", "optimizer", "temporaries")}
        memory = ", ".join(f"{part} {last[part] / 2**20:.1f} MiB ({share:.2f})" for part, share in held.items())
        print(
            f"  {label:<32}{timing.median(results[name]):6.3f} s/step  {timing.ratio(results[name], full)} of all  "
            f"loss {last['loss']:.4f}\n    {memory}"
        )


def _step(values: Values, *, targets: tuple[str, ...]) -> dict[str, Any]:
    section, rows = config(), drawn_tokens()
    if targets:
        section.adapter.name = "lora"
        section.adapter.lora.update({"rank": RANK, "alpha": 2.0 * RANK, "targets": targets})
        section.checkpoint.init_from = "not read: parameters are drawn, as those of the others"
    return train_step.ours(section, {"inputs": rows[:, :-1], "targets": rows[:, 1:]}, values["steps"])


WORKERS: dict[str, timing.Worker] = {
    "ours": lambda values: _step(values, targets=()),
    "few": lambda values: _step(values, targets=TARGETS["few"]),
    "every": lambda values: _step(values, targets=TARGETS["every"]),
}
