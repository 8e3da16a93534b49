"""A training step of the 30M Llama: all parameters, and LoRA on every matrix of the layers; time and memory of both."""

from typing import Any

from tools.benchmark import timing, train_step
from tools.benchmark.shape import SHAPE, config
from tools.benchmark.step import drawn_tokens
from tools.benchmark.timing import THREADS, Values

RANK = 8
LABELS = {"lora_step:ours": "all parameters", "lora_step:lora": f"LoRA, rank {RANK}"}


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
            f"  {label:<18}{timing.median(results[name]):6.3f} s/step  {timing.ratio(results[name], full)} of all  "
            f"loss {last['loss']:.4f}\n    {memory}"
        )


def _step(values: Values, *, adapter: str) -> dict[str, Any]:
    section, rows = config(), drawn_tokens()
    section.adapter.name = adapter
    section.adapter.lora.update({"rank": RANK, "alpha": 2.0 * RANK})
    section.checkpoint.init_from = "unused"  # parameters are drawn, as those of the other
    return train_step.ours(section, {"inputs": rows[:, :-1], "targets": rows[:, 1:]}, values["steps"])


WORKERS: dict[str, timing.Worker] = {
    "ours": lambda values: _step(values, adapter="none"),
    "lora": lambda values: _step(values, adapter="lora"),
}
