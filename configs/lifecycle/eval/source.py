"""Reads the held-out questions and texts that configs/lifecycle/data.py has written, for lm-evaluation-harness.

The tasks are found with --include_path=configs/lifecycle/eval, the files with --data=FOLDER (the lifecycle's `data`).
"""

import json
import pathlib


def load(task="", data="", **_):
    """The questions of one task."""
    return _split([record for record in _records(data, "held_out") if record["task"] == task])


def texts(name="", data="", **_):
    return _split(_records(data, name))


def bits(doc, results):
    """What a text contributes to bits per byte: (log-probability, bytes)."""
    (logp, _greedy) = results[0]
    return {"bits_per_byte": (logp, doc["bytes"])}


def _records(data, name):
    if not data:
        raise ValueError(f"the task reads {name}.jsonl of a lifecycle; give --data=FOLDER")
    return [json.loads(line) for line in pathlib.Path(data, f"{name}.jsonl").read_text().splitlines()]


def _split(records):
    import datasets

    return {"test": datasets.Dataset.from_list(records)}
