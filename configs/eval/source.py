"""Reads the files of the tasks in this folder: JSON Lines, JSON, CSV and TSV below the folder of local data.

lm-evaluation-harness calls `load` with what stands in a task's `metadata` and `dataset_kwargs`; `t5x_like evaluate
--data=FOLDER` puts `data` into the first. The harness's own command line takes --metadata='{"data": "FOLDER"}'.
"""

import csv
import json
import pathlib


def load(file="", few_shot="", data="", **_):
    """{"test": records of `file`, "train": those of `few_shot`}, both below the folder `data`."""
    import datasets

    files = {"test": file} | ({"train": few_shot} if few_shot else {})
    return {split: datasets.Dataset.from_list(records(data, name)) for split, name in files.items()}


def records(data, name):
    """The records of a file, by its ending."""
    if not data:
        raise ValueError(f"the task reads {name} below a folder of local data: give --data=FOLDER")
    place = pathlib.Path(data, name)
    if not place.is_file():
        raise ValueError(f"the task reads {place}: no such file; give the folder that holds {name} with --data=FOLDER")
    with place.open(encoding="utf-8", newline="") as file:
        if place.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        if place.suffix == ".json":
            return json.load(file)
        return list(csv.DictReader(file, delimiter="\t" if place.suffix == ".tsv" else ","))
