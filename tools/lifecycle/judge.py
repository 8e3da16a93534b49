"""The models of a lifecycle before the reward model, and on the held-out pairs.

    python -m tools.lifecycle.judge llama,runs/lifecycle merged dpo grpo
FOLDER/judged/MODEL/report.json, in the form of `t5x_like evaluate`, has two tasks of each model: `pairs` (is the right
answer, its end included, more probable than the wrong one?) and `rewards` (what the reward model says of the greedy
answer to a held-out question). Of the first model it has also `best`: of 8 sampled answers to a question, is the first
one right (`one`), the one of the highest reward (`chosen`), or any of them (`any`)?
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

import t5x_like
from t5x_like.configs.lifecycle import models
from t5x_like.configs.lifecycle.data import HELD_OUT, examples
from t5x_like.configs.lifecycle.models import Kind
from t5x_like.evaluation import report
from t5x_like.evaluation.results import Evaluation, Metric
from t5x_like.evaluation.statistics import error, mean
from t5x_like.inference.score import score
from t5x_like.language_model import LanguageModel
from tools.lifecycle.collect import sampled

SAMPLES = 8


def write(kind: Kind, folder: str, names: Sequence[str]) -> None:
    judge = t5x_like.load(f"{folder}/reward")
    text = pathlib.Path(folder, "pairs", "held_out.jsonl").read_text("utf-8")
    pairs = [json.loads(line) for line in text.splitlines()]
    for number, name in enumerate(names):
        model = t5x_like.load(f"{folder}/{name}")
        found = [*_in_order(model, pairs), *_greedy(model, judge, kind)]
        found += _best(model, judge, kind) if number == 0 else []
        whole = report.Report({}, [Evaluation(name, tuple(found), {}, 0, {})], {})
        report.write(whole, f"{folder}/judged/{name}", samples=False)
        print(whole.to_markdown())


def _in_order(model: LanguageModel, pairs: Sequence[dict]) -> Iterator[Metric]:
    sides = [[(each["prompt"], each[side]) for each in pairs] for side in ("chosen", "rejected")]
    right, wrong = (_log_probabilities(model, side) for side in sides)
    yield _metric("pairs", "accuracy", [float(a > b) for a, b in zip(right, wrong, strict=True)])


def _greedy(model: LanguageModel, judge: LanguageModel, kind: Kind) -> Iterator[Metric]:
    asked = examples(kind.all_tasks, HELD_OUT, held_out=True)
    answers = sampled(model, kind, asked, seed=0, temperature=0.0)
    yield _metric("rewards", "reward", judge.read([kind.asked.format(each.question) for each in asked], answers))


def _best(model: LanguageModel, judge: LanguageModel, kind: Kind) -> Iterator[Metric]:
    asked = examples(kind.all_tasks, HELD_OUT, held_out=True)
    prompts = [kind.asked.format(each.question) for each in asked]
    answers = [sampled(model, kind, asked, seed=100 + number, temperature=1.0) for number in range(SAMPLES)]
    rewards = np.array([judge.read(prompts, each) for each in answers])
    right = np.array([[answer.strip() == q.answer for answer, q in zip(each, asked, strict=True)] for each in answers])
    yield _metric("best", "one", right[0])
    yield _metric("best", "chosen", right[np.argmax(rewards, axis=0), np.arange(len(asked))])
    yield _metric("best", "any", right.max(axis=0))


def _metric(task: str, name: str, values: Sequence[float] | np.ndarray) -> Metric:
    items, documents = tuple(map(float, values)), tuple(map(str, range(len(values))))
    return Metric(task, name, "none", mean(items), error(items, mean), True, items, documents, mean)


def _log_probabilities(model: LanguageModel, texts: Sequence[tuple[str, str]]) -> list[float]:
    """Of answers with their end, encoded as in training."""
    encode = model.vocabulary.encode
    both = [(encode(prompt, bos=True, eos=model.has_encoder), encode(answer, eos=True)) for prompt, answer in texts]
    if model.has_encoder:
        rows, sources = [([model.start_id, *answer], 1) for _, answer in both], [prompt for prompt, _ in both]
    else:
        rows, sources = [(prompt + answer, len(prompt)) for prompt, answer in both], None
    return [each.logp for each in score(model.model, model.params, rows, sources=sources)]


if __name__ == "__main__":
    write(*models.given(sys.argv[1]), sys.argv[2:])
