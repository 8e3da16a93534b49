"""Stands in for `python -m t5x_like train` where a test is about what starts runs: no jax, a step takes milliseconds.

It keeps what a sweep relies on: the arguments, the lock, rows of metrics.jsonl with an evaluation at the last step, the
manifest, a checkpoint at every step, and the exit statuses. Its loss falls with the step and is best at a learning rate
of 0.01. What goes wrong is asked for by QUICK_FAIL=NAME:HOW in the environment.
"""

import math
import os
import pathlib
import signal
import sys
import time

from t5x_like.core.metrics import JsonlWriter
from t5x_like.storage import lock, paths


def main() -> int:
    values = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:])
    folder = pathlib.Path(values["workdir"])
    steps, rate = int(values.get("config.loop.steps", "40")), float(values.get("config.optim.learning_rate", "0.01"))
    fails = dict(each.split(":") for each in filter(None, os.environ.get("QUICK_FAIL", "").split(",")))
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    folder.mkdir(parents=True, exist_ok=True)
    with lock.locked(str(folder)):
        note(folder, f"start {os.getpid()}")
        how = fails.get(folder.name)
        if how == "fault":
            raise ValueError("the disk is on fire")
        if how == "wrong":
            print("t5x_like: config.optim.learning_rate is wrong", file=sys.stderr)
            return 2
        (folder / "config.json").write_text("{}")
        paths.write_json_atomic(str(folder / "manifest.json"), {"format": 1, "starts": []})
        checkpoint = str(folder / "checkpoint.json")
        done = paths.read_json(checkpoint) if paths.exists(checkpoint) else 0
        metrics = JsonlWriter(str(folder / "metrics.jsonl"))
        metrics.truncate_after(done)
        for step in range(done + 1, steps + 1):
            time.sleep(float(os.environ.get("QUICK_SECONDS") or "0"))
            note(folder, f"step {step}")
            loss = 1 + abs(math.log10(rate / 0.01)) + 1 / step
            values_of_step = {"train/loss": math.nan if how == "nan" else loss}
            if step == steps and how != "unevaluated":
                values_of_step["eval/validation/loss"] = values_of_step["train/loss"]
            metrics.write(step, values_of_step)
            paths.write_json_atomic(checkpoint, step)
            if how == "late":
                raise ValueError("the disk is full")
            if asked or how == "preempted":
                return 75
        metrics.close()
        paths.write_json_atomic(str(folder / "manifest.json"), {"format": 1, "starts": [], "finished": {"step": steps}})
    print("finished")
    return 0


def note(folder: pathlib.Path, line: str) -> None:
    with open(folder / "log.quick.txt", "a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
