"""The whole life of a small model: read, instructed, adapted, judged, aligned, reinforced, compressed, measured.

    make lifecycle
Hardware: 2 CPU cores; 430 s of CPU beside pretraining. Gains and their intervals: docs/log.md.

The model is that of configs/pretrain/tiny.py: one million parameters that have read Shakespeare. What it can really
learn decides the tasks (tasks.py): rules over a few tokens that are always the same, letters with blanks between them
and numbers up to 100, which attention can copy, order and count; a wrong answer is one token away from a right one. So
every stage has something to gain that a held-out question can show: instruction tuning the form of an answer and part
of the rules, an adapter a rule that the model has not seen, reward model and DPO the difference between right and
almost right, GRPO the answers that sampling finds now and then. Real conversations (those of configs/instruct) are one
fifth of the tokens: they show that language is learned beside rules, by bits per byte, since a model of this size does
not learn to be right about the world. The plays that it read first show what it forgets.

A held-out question is decided by its own digest (tasks.py), so the hundred questions of each task were in no run's
data, GRPO's included. All models answer the same questions, and differences are taken question by question.
"""

QUESTIONS = tuple(f"lifecycle_{name}" for name in ("reverse", "sort", "repeat", "count", "add"))
CONFIGS = "configs/lifecycle"
COMMON = ("configs/lifecycle/tasks.py",)
MEASURES = ("questions", "pairs", "conversations", "plays")
CHAT = ("Reverse: b a d c", "Sort: t e a m", "Count a: a b c a a", "Add 12 and 7.", "Give me a list of fruits.")


def get_stages(folder: str, base: str = "runs/tiny") -> list[dict]:
    """`folder`: of all that is made; `base`: the workdir of configs/pretrain/tiny.py, trained here where it is not."""
    return [*_begin(folder, base), *_preferences(folder), *_end(folder)]


def _begin(folder: str, base: str) -> list[dict]:
    data, instruct = f"{folder}/data", f"{folder}/instruct"
    return [
        {
            "name": "data",
            "says": "writes questions, pairs and held-out texts",
            "command": ["-m", "configs.lifecycle.data", data],
            "reads": [*COMMON, f"{CONFIGS}/data.py", "configs/data/instructions", "configs/data/tinyshakespeare"],
            "makes": data,
        },
        {
            "name": "pretrain",
            "says": f"trains tokenizer and model on the works of Shakespeare, or finds them in {base}",
            "command": ["-m", "t5x_like", "train", "--config=configs/pretrain/tiny.py", f"--workdir={base}"],
            "makes": base,
            "resumes": True,
            "curves": ["train/loss", "eval/validation/bits_per_byte"],
        },
        evaluate(folder, "pretrain", base),
        run(
            *(folder, "instruct", f"--config.checkpoint.init_from={base}", f"--config.data.tokenizer={base}/tokenizer"),
            reads=[base, data],
            says="instruction tuning on questions and conversations",
        )
        | {"gains": gains(folder, "instruct", "pretrain", *MEASURES)},
        evaluate(folder, "instruct"),
        run(folder, "lora", reads=[instruct, data], says="an adapter of rank 8 for a task that is new (double)")
        | {"gains": gains(folder, "lora", "instruct", "double", "questions")},
        evaluate(folder, "lora"),
    ]


def _preferences(folder: str) -> list[dict]:
    reads, curves = [f"{folder}/instruct", f"{folder}/data"], ["train/loss", "eval/validation/accuracy"]
    in_order = share(folder, "dpo", "held-out pairs in order, beside the reference")
    return [
        run(folder, "reward", reads=reads, says="a reward model on pairs of right and wrong answers")
        | {"gains": [share(folder, "reward", "held-out pairs in order")], "curves": curves},
        run(folder, "dpo", reads=reads, says="DPO on the same pairs")
        | {"gains": [in_order, *gains(folder, "dpo", "instruct", *MEASURES)], "curves": curves},
        evaluate(folder, "dpo"),
    ]


def _end(folder: str) -> list[dict]:
    instruct, dpo, grpo, export = (f"{folder}/{name}" for name in ("instruct", "dpo", "grpo", "export"))
    return [
        run(folder, "grpo", reads=[instruct, dpo, *COMMON], says="GRPO: right answers are reinforced", command="rl")
        | {"gains": gains(folder, "grpo", "dpo", *MEASURES), "curves": ["train/loss", "eval/validation/reward/exact"]},
        evaluate(folder, "grpo"),
        {
            "name": "export",
            "says": "int8 weights as a compressed-tensors folder",
            "command": ["-m", "t5x_like", "export", grpo, export, "--format=compressed-tensors"],
            "reads": [grpo],
            "makes": export,
            "gains": gains(folder, "export", "grpo", *MEASURES),
        },
        evaluate(folder, "export"),
        {
            "name": "sample",
            "says": "the exported folder is read again and answers",
            "command": [
                *["-m", "t5x_like", "generate", export, "--chat", "--temperature=0", "--max_new_tokens=40"],
                *(f"--prompt={each}" for each in CHAT),
            ],
            "reads": [export],
            "samples": [f"{folder}/logs/sample.txt"],
        },
    ]


def run(folder: str, name: str, *overrides: str, reads: list[str], says: str, command: str = "train") -> dict:
    config = f"--config={CONFIGS}/{name}.py:{folder}"
    return {
        "name": name,
        "says": says,
        "command": ["-m", "t5x_like", command, config, f"--workdir={folder}/{name}", *overrides],
        "reads": reads,
        "makes": f"{folder}/{name}",
        "resumes": True,
        "curves": ["train/loss"],
    }


def evaluate(folder: str, name: str, directory: str = "") -> dict:
    """Every model answers all questions. Reports lie in FOLDER/evaluate_NAME."""
    directory, output = directory or f"{folder}/{name}", f"{folder}/evaluate_{name}"
    asked = ["--tasks=lifecycle_*", f"--include_path={CONFIGS}/eval", f"--data={folder}/data"]
    return {
        "name": f"evaluate_{name}",
        "says": f"{name} answers the held-out questions",
        "command": ["-m", "t5x_like", "evaluate", directory, *asked, f"--output={output}", "--samples"],
        "reads": [directory, f"{folder}/data", f"{CONFIGS}/eval"],
        "makes": output,
        "samples": [f"{output}/samples/*/lifecycle_reverse.jsonl", f"{output}/samples/*/lifecycle_double.jsonl"],
    }


def gains(folder: str, name: str, before: str, *of: str) -> list[dict]:
    """What a model gained over the one before it."""
    known = {
        "questions": ("exact match, five tasks", "exact_match", QUESTIONS),
        "double": ("exact match, double", "exact_match", ("lifecycle_double",)),
        "pairs": ("pairs in order by probability", "acc", ("lifecycle_pairs",)),
        "conversations": ("bits per byte, conversations", "bits_per_byte", ("lifecycle_conversations",)),
        "plays": ("bits per byte, plays", "bits_per_byte", ("lifecycle_plays",)),
    }
    report, old = (f"{folder}/evaluate_{each}/report.json" for each in (name, before))
    return [
        {"kind": "paired", "label": label, "metric": metric, "tasks": tasks, "report": report, "before": old}
        for label, metric, tasks in (known[each] for each in of)
    ]


def share(folder: str, name: str, label: str) -> dict:
    metrics, metric = f"{folder}/{name}/metrics.jsonl", "eval/validation/accuracy"
    return {"kind": "share", "label": label, "metrics": metrics, "metric": metric, "count": 300, "chance": 0.5}
