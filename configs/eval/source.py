"""Reads the files of the tasks in this folder, which lie below a folder of local data.

lm-evaluation-harness calls these functions with what stands in a task's `metadata` and `dataset_kwargs`; `t5x_like
evaluate --data=FOLDER` puts `data` into the former. The harness's own command takes --metadata='{"data": "FOLDER"}'.
Where a set has subjects, the n-th records of all subjects follow each other, so that --limit takes some of each.
"""

import csv
import io
import json
import pathlib
import re


def load(file="", few_shot="", data="", **_):
    """{"test": records of `file`, "train": those of `few_shot`}: JSON Lines, JSON, CSV or TSV by their endings."""
    files = {"test": file} | ({"train": few_shot} if few_shot else {})
    return splits({split: records(data, name) for split, name in files.items()})


def choices(file="", data="", **_):
    """Questions whose answers stand in the instruction: "... : QUESTION Answer1: A Answer2: B Answer format: a/b"."""
    found = []
    for record in records(data, file):
        body, _, names = record["instruction"].rpartition("Answer format:")
        names = names.strip().split("/")
        question, *parts = re.split(r"\s*\b(?:Answer|Option|Solution|Ending)\d:\s*", body.split(": ", 1)[1])
        texts = [part.strip() for part in parts] or names
        gold = names.index(record["answer"])
        found.append({"question": question.strip(), "choices": texts, "gold": gold})
    return splits({"test": found})


def labelled(file="", data="", **_):
    """Lines of a label, a space and a text."""
    lines = [line.split(" ", 1) for line in text(data, file).splitlines()]
    return splits({"test": [{"label": int(label), "text": rest} for label, rest in lines]})


def lines(file="", data="", **_):
    return splits({"test": [{"text": line} for line in text(data, file).split("\n") if line]})


def mmlu(folder="", shots=5, data="", **_):
    """Questions of all subjects, each with the first `shots` of its subject's development set before it."""
    found = []
    for place in files(data, f"{folder}/test", "*_test.csv"):
        subject = place.name.removesuffix("_test.csv")
        questions, before = (
            [_question(row) for row in csv.reader(_opened(data, f"{folder}/{split}/{subject}_{split}.csv"))]
            for split in ("test", "dev")
        )
        prompt = "".join(f"{_asked(each)} {'ABCD'[each['gold']]}\n\n" for each in before[:shots])
        name = subject.replace("_", " ")
        found.append([{"subject": name, "prompt": prompt + _asked(each), "gold": each["gold"]} for each in questions])
    return splits({"test": _in_turns(found)})


def bbh(folder="", data="", **_):
    """Questions of all tasks behind their task's prompt of three worked examples."""
    found = []
    for place in files(data, f"{folder}/bbh", "*.json"):
        prompt = text(data, f"{folder}/cot-prompts/{place.stem}.txt").partition("-----\n")[2].strip()
        found.append([{"prompt": prompt, **each} for each in json.loads(place.read_text("utf-8"))["examples"]])
    return splits({"test": _in_turns(found)})


def _question(row):
    return {"question": row[0], "choices": row[1:5], "gold": "ABCD".index(row[5])}


def _asked(each):
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", each["choices"], strict=True))
    return f"{each['question'].strip()}\n{options}Answer:"


def _in_turns(groups):
    longest = max(map(len, groups))
    return [group[index] for index in range(longest) for group in groups if index < len(group)]


def records(data, name):
    content = text(data, name)
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    if name.endswith(".json"):
        return json.loads(content)
    return list(csv.DictReader(_opened(data, name), delimiter="\t" if name.endswith(".tsv") else ","))


def _opened(data, name):
    """For csv, whose fields may hold ends of lines."""
    return io.StringIO(text(data, name), newline="")


def text(data, name):
    return files(data, str(pathlib.PurePath(name).parent), pathlib.PurePath(name).name)[0].read_text("utf-8")


def files(data, folder, pattern):
    """The files of this name in a folder below `data`, in order."""
    if not data:
        raise ValueError(f"the task reads {folder}/{pattern} below a folder of local data; give --data=FOLDER")
    found = sorted(pathlib.Path(data, folder).glob(pattern))
    if not found:
        raise ValueError(f"{data} has no {folder}/{pattern}, which the task reads; give --data=FOLDER that has it")
    return found


def splits(named):
    import datasets

    return {split: datasets.Dataset.from_list(found) for split, found in named.items()}
