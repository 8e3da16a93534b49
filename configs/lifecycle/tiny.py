"""The whole life of a small model: read, instructed, adapted, judged, aligned, reinforced, compressed, measured.

    make lifecycle                                             a decoder, from configs/pretrain/tiny.py
    make lifecycle CONFIG=configs/lifecycle/tiny.py:t5         an encoder-decoder, from configs/pretrain/t5_tiny.py
    make lifecycle CONFIG=configs/lifecycle/tiny.py:llama,1    the decoder again, its later runs with another seed
Hardware: 2 CPU cores, 9 minutes for the decoder, pretraining included. Gains and their intervals: docs/log.md.

The models have one million parameters and have read Shakespeare. What they can really learn decides the tasks
(tasks.py): rules over a few letters that are one token each, which attention can copy, order, drop and count. A T5 of
this size does not learn in minutes in which order letters stood, so its answers are alphabetic. Every stage has
something to gain that a held-out question can show:

- instruction tuning: the form of an answer, and rules. Demonstrations are what people give: of some tasks 11 in 20 are
  careless (letters written down as they stand), and a model learns that too
- an adapter: a rule that the model has not seen, beside what it knows. It is merged, so that what follows knows it
- the model's own wrong answers beside the right ones are pairs, for a reward model and for DPO. They tell care from
  carelessness, which no further demonstration of the same kind would
- GRPO: what is right is reinforced, and a little of what the reward model prefers among wrong answers

Real conversations (those of configs/instruct) are one fifth of the tokens: they show that language is learned beside
rules, by bits per byte, since a model of this size does not learn to be right about the world. The plays that it read
first show what it forgets.

A held-out question is decided by its own digest (tasks.py), so the hundred questions of each task were in no run's
data, GRPO's included. All models answer the same questions, and differences are taken question by question.
"""

from t5x_like.configs.lifecycle import models, preferences
from t5x_like.configs.lifecycle.building import TOOLS, WRITES, evaluate, gains, run
from t5x_like.configs.lifecycle.models import Kind

ASKED = {
    "llama": (
        "Reverse: b a d c",
        "Sort: t e a m",
        "Count a: a b c a a",
        "Double: g o",
        "Give me a list of fruits.",
    ),
    "t5": ("Sort: t e a m", "Down: t e a m", "Least: t e a m", "Ends: t e a m", "List some fruits."),
}


def get_stages(folder: str, kind: str = "llama") -> list[dict]:
    """`folder`: of all that is made; `kind`: llama or t5, or with a seed of all that follows the base, as in `t5,1`. A
    base of that kind is trained where there is none."""
    name, _, seed = kind.partition(",")
    found = models.KINDS[name]._replace(seed=int(seed or 0))
    return [*_begin(found, folder), *_adapted(found, folder), *preferences.stages(found, folder), *_end(found, folder)]


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
    learned = ["examples", "new_examples", *([] if kind.chat else ["people"])]
    reads = [f"{folder}/instruct", *(f"{folder}/data/{name}.jsonl" for name in learned)]
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


def _end(kind: Kind, folder: str) -> list[dict]:
    grpo, export = f"{folder}/grpo", f"{folder}/export"
    form, says, read = "compressed-tensors", "int8 weights as a compressed-tensors folder", []
    asks = ["--chat", *(f"--prompt={each}" for each in ASKED[kind.name])]
    if not kind.chat:
        form, says, read = "hf", "a Hugging Face folder, in floats; it is read in int8", ["--dtype=int8"]
        asks = [f"--prompt={each}" for each in ASKED[kind.name]]
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
