"""The whole life of a small model: read, instructed, adapted, judged, aligned, reinforced, compressed, measured.

    make lifecycle                                             a decoder, from configs/pretrain/tiny.py
    make lifecycle CONFIG=configs/lifecycle/tiny.py:t5         an encoder-decoder, from configs/pretrain/t5_tiny.py
Hardware: 2 CPU cores. Gains and their intervals: docs/log.md.

The models have one million parameters and have read Shakespeare. What they can really learn decides the tasks
(tasks.py): rules over a few letters that are one token each, which attention can copy, order, drop and count. A T5 of
this size does not learn in minutes in which order letters stood, so its answers are alphabetic. Every stage has
something to gain that a held-out question can show:

- instruction tuning: the form of an answer, and rules. Demonstrations are what people give: of some tasks 11 in 20 are
  careless (letters written down as they stand), and a model learns that too
- an adapter: a rule that the model has not seen. It is merged, so that what follows knows it
- the model's own wrong answers beside the right ones are pairs, for a reward model and for DPO. They tell care from
  carelessness, which no further demonstration of the same kind would
- GRPO: what is right is reinforced, and a little of what the reward model prefers among wrong answers

Real conversations (those of configs/instruct) are one fifth of the tokens: they show that language is learned beside
rules, by bits per byte, since a model of this size does not learn to be right about the world. The plays that it read
first show what it forgets.

A held-out question is decided by its own digest (tasks.py), so the hundred questions of each task were in no run's
data, GRPO's included. All models answer the same questions, and differences are taken question by question.
"""

from t5x_like.configs.lifecycle import models
from t5x_like.configs.lifecycle.models import Kind

CONFIGS, TOOLS = "configs/lifecycle", "tools/lifecycle"
COMMON = (f"{CONFIGS}/tasks.py", f"{CONFIGS}/models.py")
WRITES = (*COMMON, f"{CONFIGS}/data.py")
ASKED = {
    models.LLAMA: (
        "Reverse: b a d c",
        "Sort: t e a m",
        "Count a: a b c a a",
        "Double: g o",
        "Give me a list of fruits.",
    ),
    models.T5: ("Sort: t e a m", "Down: t e a m", "Least: t e a m", "Ends: t e a m", "List some fruits."),
}


def get_stages(folder: str, kind: str = "llama") -> list[dict]:
    """`folder`: of all that is made; `kind`: llama or t5. A base of that kind is trained where there is none."""
    found = models.KINDS[kind]
    return [*_begin(found, folder), *_adapted(found, folder), *_preferences(found, folder), *_end(found, folder)]


def _begin(kind: Kind, folder: str) -> list[dict]:
    data, base = f"{folder}/data", kind.base
    learned = [f"{data}/examples.jsonl", f"{data}/people.jsonl"]
    return [
        {
            "name": "data",
            "says": "writes questions and held-out texts",
            "command": ["-m", "configs.lifecycle.data", f"{kind.name},{folder}"],
            "reads": [*WRITES, "configs/data/instructions", "configs/data/tinyshakespeare"],
            "makes": data,
        },
        {
            "name": "pretrain",
            "says": f"trains tokenizer and model on the works of Shakespeare, or finds them in {base}",
            "command": ["-m", "t5x_like", "train", f"--config={kind.pretrain}", f"--workdir={base}"],
            "makes": base,
            "resumes": True,
            "curves": ["train/loss", "eval/validation/bits_per_byte"],
        },
        evaluate(kind, folder, "pretrain", base),
        run(kind, folder, "instruct", reads=[base, *learned], says="instruction tuning on questions and conversations")
        | {"gains": gains(kind, folder, "instruct", "pretrain", "five", "people", "plays")},
        evaluate(kind, folder, "instruct"),
    ]


def _adapted(kind: Kind, folder: str) -> list[dict]:
    reads = [f"{folder}/instruct", f"{folder}/data/examples.jsonl", f"{folder}/data/new_examples.jsonl"]
    return [
        run(kind, folder, "lora", reads=reads, says="an adapter of rank 8 for a task that is new")
        | {"gains": gains(kind, folder, "lora", "instruct", "new", "five", "people")},
        evaluate(kind, folder, "lora"),
        run(kind, folder, "full", reads=reads, says="for comparison: the same steps with all parameters")
        | {"gains": gains(kind, folder, "full", "lora", "new", "five", "people", beside=True)},
        evaluate(kind, folder, "full"),
        {
            "name": "merge",
            "says": "the adapter becomes part of the model that goes on",
            "command": ["-m", "t5x_like", "convert", f"{folder}/lora", f"{folder}/merged", "--to=native", "--verify"],
            "reads": [f"{folder}/lora", f"{folder}/instruct"],
            "makes": f"{folder}/merged",
        },
        {
            "name": "collect",
            "says": "its own wrong answers beside right ones become pairs",
            "command": ["-m", "tools.lifecycle.collect", f"{kind.name},{folder}"],
            "reads": [*WRITES, f"{TOOLS}/collect.py", f"{folder}/merged"],
            "makes": f"{folder}/pairs",
        },
    ]


def _preferences(kind: Kind, folder: str) -> list[dict]:
    merged, pairs, dpo, reward = (f"{folder}/{name}" for name in ("merged", "pairs", "dpo", "reward"))
    curves = ["train/loss", "eval/validation/accuracy"]
    judged = f"{folder}/judged/merged/report.json"
    best = {"kind": "paired", "tasks": ["best"], "report": judged, "before": judged, "before_metric": "one"}
    return [
        run(kind, folder, "reward", reads=[merged, pairs], says="a reward model on these pairs", curves=curves)
        | {
            "gains": [
                share(folder, "reward", "held-out pairs in order"),
                best | {"label": "exact match, six tasks, sampled: best of 8 by reward beside one", "metric": "chosen"},
            ]
        },
        run(kind, folder, "dpo", reads=[merged, pairs], says="DPO on the same pairs", curves=curves)
        | {
            "gains": [
                *judged_gains(folder, "dpo", "merged"),
                *gains(kind, folder, "dpo", "lora", "six", "people", "plays"),
            ]
        },
        evaluate(kind, folder, "dpo"),
        run(
            *(kind, folder, "grpo"),
            reads=[dpo, reward, f"{folder}/instruct/tokenizer", *COMMON],
            says="GRPO: right answers, and answers that the reward model prefers, are reinforced",
            command="rl",
            curves=["train/reward/exact", "train/reward/preferred", "eval/validation/reward/exact"],
        )
        | {
            "gains": [
                *gains(kind, folder, "grpo", "dpo", "six"),
                *gains(kind, folder, "grpo", "lora", "six", "people", "plays", beside=True),
                *judged_gains(folder, "grpo", "dpo"),
            ]
        },
        evaluate(kind, folder, "grpo"),
        {
            "name": "judge",
            "says": "the reward model judges the answers of merged, dpo and grpo",
            "command": ["-m", "tools.lifecycle.judge", f"{kind.name},{folder}", "merged", "dpo", "grpo"],
            "reads": [
                *(*WRITES, f"{TOOLS}/collect.py", f"{TOOLS}/judge.py"),
                *(merged, dpo, reward, pairs, f"{folder}/grpo"),
            ],
            "makes": f"{folder}/judged",
        },
    ]


def _end(kind: Kind, folder: str) -> list[dict]:
    grpo, export = f"{folder}/grpo", f"{folder}/export"
    form, says, read = "compressed-tensors", "int8 weights as a compressed-tensors folder", []
    asks = ["--chat", *(f"--prompt={each}" for each in ASKED[kind])]
    if not kind.chat:
        form, says, read = "hf", "a Hugging Face folder, in floats; it is read in int8", ["--dtype=int8"]
        asks = [f"--prompt={each}" for each in ASKED[kind]]
    return [
        {
            "name": "export",
            "says": says,
            "command": ["-m", "t5x_like", "export", grpo, export, f"--format={form}"],
            "reads": [grpo],
            "makes": export,
            "gains": gains(kind, folder, "export", "grpo", "six", "people", "plays"),
        },
        evaluate(kind, folder, "export", "", *read),
        {
            "name": "sample",
            "says": "the exported folder is read again and answers",
            "command": ["-m", "t5x_like", "generate", export, "--temperature=0", "--max_new_tokens=40", *read, *asks],
            "reads": [export],
            "samples": [f"{folder}/logs/sample.txt"],
        },
    ]


def run(
    kind: Kind,
    folder: str,
    name: str,
    *,
    reads: list[str],
    says: str,
    command: str = "train",
    curves: list[str] | None = None,
) -> dict:
    config = f"--config={CONFIGS}/{name}.py:{kind.name},{folder}"
    return {
        "name": name,
        "says": says,
        "command": ["-m", "t5x_like", command, config, f"--workdir={folder}/{name}"],
        "reads": reads,
        "makes": f"{folder}/{name}",
        "resumes": True,
        "curves": curves or ["train/loss"],
    }


def evaluate(kind: Kind, folder: str, name: str, directory: str = "", *options: str) -> dict:
    """Every model answers all questions. Reports lie in FOLDER/evaluate_NAME."""
    directory, output = directory or f"{folder}/{name}", f"{folder}/evaluate_{name}"
    tasks = ",".join(f"lifecycle_{each}" for each in (*kind.all_tasks, "people", "plays"))
    asked = [f"--tasks={tasks}", f"--include_path={CONFIGS}/eval", f"--data={folder}/data"]
    return {
        "name": f"evaluate_{name}",
        "says": f"{name} answers the held-out questions",
        "command": ["-m", "t5x_like", "evaluate", directory, *asked, f"--output={output}", "--samples", *options],
        "reads": [directory, f"{folder}/data", f"{CONFIGS}/eval"],
        "makes": output,
        "samples": [f"{output}/samples/*/lifecycle_{task}.jsonl" for task in (*kind.tasks[:2], kind.new)],
    }


def gains(kind: Kind, folder: str, name: str, before: str, *of: str, beside: bool = False) -> list[dict]:
    """What a model gained over the one before it, or has beside another one."""
    new = f"lifecycle_{kind.new}"
    five = tuple(f"lifecycle_{each}" for each in kind.tasks)
    known = {
        "five": ("exact match, five tasks", "exact_match", five),
        "six": ("exact match, six tasks", "exact_match", (*five, new)),
        "new": (f"exact match, {kind.new}", "exact_match", (new,)),
        "people": ("bits per byte, people's answers", "bits_per_byte", ("lifecycle_people",)),
        "plays": ("bits per byte, plays", "bits_per_byte", ("lifecycle_plays",)),
    }
    report, old = (f"{folder}/evaluate_{each}/report.json" for each in (name, before))
    other = f", beside {before}" if beside else ""
    return [
        {"kind": "paired", "label": label + other, "metric": metric, "tasks": tasks, "report": report, "before": old}
        for label, metric, tasks in (known[each] for each in of)
    ]


def judged_gains(folder: str, name: str, before: str) -> list[dict]:
    report, old = (f"{folder}/judged/{each}/report.json" for each in (name, before))
    return [
        {"kind": "paired", "label": label, "metric": metric, "tasks": [task], "report": report, "before": old}
        for label, task, metric in (
            ("held-out pairs in order by probability", "pairs", "accuracy"),
            ("reward of greedy answers", "rewards", "reward"),
        )
    ]


def share(folder: str, name: str, label: str) -> dict:
    metrics, metric = f"{folder}/{name}/metrics.jsonl", "eval/validation/accuracy"
    records = f"{folder}/pairs/held_out.jsonl"
    return {"kind": "share", "label": label, "metrics": metrics, "metric": metric, "records": records, "chance": 0.5}
