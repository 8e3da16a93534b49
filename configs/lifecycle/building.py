"""What the stages of tiny.py are built of: a run of a config beside it, an evaluation, and what was gained."""

from t5x_like.configs.lifecycle.models import Kind

CONFIGS, TOOLS = "configs/lifecycle", "tools/lifecycle"
COMMON = (f"{CONFIGS}/tasks.py", f"{CONFIGS}/models.py")
WRITES = (*COMMON, f"{CONFIGS}/data.py")


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
    seed = [f"--config.seed={kind.seed}"] if kind.seed else []
    return {
        "name": name,
        "says": says,
        "command": ["-m", "t5x_like", command, config, f"--workdir={folder}/{name}", *seed],
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
