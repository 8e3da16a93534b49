"""The stages of tiny.py that learn from what is better and what is worse: reward model, DPO, GRPO, and their judge."""

from t5x_like.configs.lifecycle.building import COMMON, TOOLS, WRITES, evaluate, gains, judged_gains, run, share
from t5x_like.configs.lifecycle.models import Kind


def stages(kind: Kind, folder: str) -> list[dict]:
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
