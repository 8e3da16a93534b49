"""Pairs for a reward model and for DPO: what a model answers to questions of the training part, where that is wrong,
beside the right answer. People's votes would do the same for questions that no rule can answer.

python -m tools.lifecycle.collect llama,runs/lifecycle
"""

import pathlib
import sys
from collections.abc import Sequence

import t5x_like
from t5x_like.configs.lifecycle import models
from t5x_like.configs.lifecycle.data import HELD_OUT, examples, lines
from t5x_like.configs.lifecycle.models import Kind
from t5x_like.configs.lifecycle.tasks import Example
from t5x_like.language_model import LanguageModel

QUESTIONS, TRIES = 600, 4  # of each task, for training; how often a held-out question is asked, for a wrong answer
BATCH, AT_ONCE = 20, 600  # held-out pairs are a multiple of it; rows that are decoded at once


def write(kind: Kind, folder: str) -> None:
    """FOLDER/pairs/train.jsonl and held_out.jsonl, of FOLDER/merged."""
    model = t5x_like.load(f"{folder}/merged")
    out = pathlib.Path(folder, "pairs")
    out.mkdir(parents=True, exist_ok=True)
    lines(out / "train.jsonl", _pairs(model, kind, examples(kind.all_tasks, QUESTIONS, seed=1), seed=1))
    held = examples(kind.all_tasks, HELD_OUT, held_out=True)
    first: dict[str, dict] = {}  # one pair of a question
    for seed in range(TRIES):
        first = {each["prompt"]: each for each in _pairs(model, kind, held, seed=seed)} | first
    found = [*first.values()]
    lines(out / "held_out.jsonl", found[: len(found) // BATCH * BATCH])


def sampled(model: LanguageModel, kind: Kind, asked: Sequence[Example], *, seed: int, temperature: float) -> list[str]:
    """One answer to each question."""
    found: list[str] = []
    for begin in range(0, len(asked), AT_ONCE):
        prompts = [kind.asked.format(each.question) for each in asked[begin : begin + AT_ONCE]]
        found += model.generate(
            prompts, max_new_tokens=models.ANSWER, temperature=temperature, seed=seed * len(asked) + begin
        )
    return found


def _pairs(model: LanguageModel, kind: Kind, asked: Sequence[Example], *, seed: int) -> list[dict]:
    answers = sampled(model, kind, asked, seed=seed, temperature=1.0)
    return [
        {"prompt": kind.asked.format(each.question), "chosen": each.answer, "rejected": answer}
        for each, answer in zip(asked, answers, strict=True)
        if answer.strip() and answer.strip() != each.answer
    ]


if __name__ == "__main__":
    write(*models.given(sys.argv[1]))
