"""The models of a lifecycle before the reward model, and on the held-out pairs.

    python -m configs.lifecycle.judge llama,runs/lifecycle merged dpo grpo
FOLDER/judged/MODEL/report.json, in the form of `t5x_like evaluate`, has two tasks of each model: `pairs` (is the right
answer, its end included, more probable than the wrong one?) and `rewards` (what the reward model says of the greedy
answer to a held-out question). Of the first model it has also `best`: of 8 sampled answers to a question, is the first
one right (`one`), the one of the highest reward (`chosen`), or any of them (`any`)?
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import t5x_like
from t5x_like.configs.lifecycle import models
from t5x_like.configs.lifecycle.collect import sampled
from t5x_like.configs.lifecycle.data import HELD_OUT, examples
from t5x_like.configs.lifecycle.models import Kind
from t5x_like.configs.lifecycle.tasks import ALL_TASKS
from t5x_like.evaluation import report
from t5x_like.evaluation.results import Evaluation, Metric
from t5x_like.evaluation.statistics import error, mean
from t5x_like.inference.score import score
from t5x_like.language_model import LanguageModel
from t5x_like.objectives import reward
from t5x_like.objectives.interface import frozen_role

SAMPLES, ROWS = 8, 200


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
    asked = examples(ALL_TASKS, HELD_OUT, held_out=True)
    answers = sampled(model, kind, asked, seed=0, temperature=0.0)
    texts = [(kind.asked.format(each.question), answer) for each, answer in zip(asked, answers, strict=True)]
    yield _metric("rewards", "reward", _rewards(judge, texts))


def _best(model: LanguageModel, judge: LanguageModel, kind: Kind) -> Iterator[Metric]:
    asked = examples(ALL_TASKS, HELD_OUT, held_out=True)
    right, rewards = [], []
    for seed in range(SAMPLES):
        answers = sampled(model, kind, asked, seed=100 + seed, temperature=1.0)
        right.append([float(answer.strip() == each.answer) for each, answer in zip(asked, answers, strict=True)])
        rewards.append(
            _rewards(judge, [(kind.asked.format(q.question), answer) for q, answer in zip(asked, answers, strict=True)])
        )
    rights = np.array(right)
    yield _metric("best", "one", rights[0].tolist())
    chosen = np.argmax(np.array(rewards), axis=0)
    yield _metric("best", "chosen", rights[chosen, np.arange(len(asked))].tolist())
    yield _metric("best", "any", rights.max(axis=0).tolist())


def _metric(task: str, name: str, values: Sequence[float]) -> Metric:
    items, documents = tuple(values), tuple(map(str, range(len(values))))
    return Metric(task, name, "none", mean(items), error(items, mean), True, items, documents, mean)


def _tokens(model: LanguageModel, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer with its end) of each, as training encodes them."""
    vocabulary = model.vocabulary
    assert vocabulary.eos_id is not None
    end = [vocabulary.eos_id]
    return [
        (vocabulary.encode(prompt, bos=True) + (end if model.has_encoder else []), vocabulary.encode(answer) + end)
        for prompt, answer in texts
    ]


def _log_probabilities(model: LanguageModel, texts: Sequence[tuple[str, str]]) -> list[float]:
    both = _tokens(model, texts)
    if model.has_encoder:
        rows, sources = [([model.start_id, *answer], 1) for _, answer in both], [prompt for prompt, _ in both]
    else:
        rows, sources = [(prompt + answer, len(prompt)) for prompt, answer in both], None
    return [each.logp for each in score(model.model, model.params, rows, sources=sources)]


def _rewards(judge: LanguageModel, texts: Sequence[tuple[str, str]]) -> list[float]:
    role = frozen_role(judge.model, "reward")
    compute = jax.jit(lambda params, batch: reward.rewards(role, {}, {"reward": params}, batch, key=None))
    found: list[float] = []
    tokens = _tokens(judge, texts)
    for begin in range(0, len(tokens), ROWS):
        part = tokens[begin : begin + ROWS]
        rows = [prompt + answer for prompt, answer in part]
        rows += [[0]] * (ROWS - len(rows))
        batch = {"inputs": _padded(rows), "segment_ids": _padded([[1] * len(row) for row in rows])}
        found += np.asarray(compute(judge.params, batch)).tolist()[: len(part)]
    return found


def _padded(rows: Sequence[Sequence[int]]) -> jax.Array:
    array = np.zeros((len(rows), models.LENGTH), np.int32)
    for number, row in enumerate(rows):
        array[number, : len(row)] = row[: models.LENGTH]
    return jnp.asarray(array)


if __name__ == "__main__":
    write(*models.given(sys.argv[1]), sys.argv[2:])
