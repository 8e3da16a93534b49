"""How long asynchronous saving stalls the loop: the 30M Llama with AdamW, a save every few steps."""

import json
import pathlib
import statistics
import tempfile
from typing import Any

from tools.benchmark import timing
from tools.benchmark.example import arguments
from tools.benchmark.shape import SHAPE
from tools.benchmark.timing import Values

SAVE_EVERY = 8  # steps; long enough for the save before to be written
REALISTIC_EVERY = 100
SAVED_RUN = {
    "data.batch_size": 2,  # the state is what counts
    "data.length": SHAPE["length"],
    "model.width": SHAPE["width"],
    "model.decoder.layers": SHAPE["layers"],
    "model.decoder.heads": SHAPE["heads"],
    "model.decoder.kv_heads": SHAPE["heads"],
    "model.decoder.head_size": SHAPE["width"] // SHAPE["heads"],
    "model.decoder.mlp": SHAPE["mlp"],
    "model.head.tied": False,
    "model.vocab_size": SHAPE["vocab"],
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


def measure(rounds: int, steps: int) -> None:
    del steps
    result = timing.run_worker("save:train", {"saves": rounds + 1})
    first, later, step = result["stalls"][0], result["stalls"][1:], result["step_seconds"]
    stall = statistics.median(later)
    print(f"\nasynchronous saves of {result['bytes']} bytes of state, every {SAVE_EVERY} steps of {step:.2f} s")
    print(timing.machine("orbax-checkpoint"))
    print(f"  {'the loop waits':<40}{stall:6.2f} s a save (median of {len(later)}), {first:.2f} s at the first")
    for every in (SAVE_EVERY, REALISTIC_EVERY):
        between = f"a save every {every} steps ({every * step / 60:.1f} min)"
        print(f"  {between:<40}{stall / (every * step + stall):6.2%} of the time the loop waits")


def _train(values: Values) -> dict[str, Any]:
    """Trains with a save every few steps. A stall is what lies between two rows beyond the seconds of the step."""
    import numpy as np

    from t5x_like.commands import train
    from t5x_like.core.metrics import read_rows

    steps = values["saves"] * SAVE_EVERY + 2
    with tempfile.TemporaryDirectory() as workdir:
        train.run([*arguments(SAVED_RUN | {"loop.steps": steps}), f"--workdir={workdir}"])
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


WORKERS: dict[str, timing.Worker] = {"train": _train}
