"""Runs tasks of lm-evaluation-harness (EleutherAI's lm_eval, in this process) on a model of ours.

Tasks are found by name in folders of YAML files: given ones, those that come with this program, then the harness's
own. lm_eval is imported when it is needed: it takes seconds, and is the extra [eval].
"""

import contextlib
import copy
import dataclasses
import fnmatch
import io
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.evaluation import statistics
from t5x_like.evaluation.model import EvaluatedModel
from t5x_like.evaluation.results import Aggregate, Evaluation, Metric

SHIPPED = pathlib.Path(__file__).parents[1] / "configs" / "eval"


@dataclasses.dataclass(frozen=True)
class Settings:
    """limit: documents of each task at most, None for all. shots: examples before each question, None for what the task
    says. generation: NAME=VALUE,... over every task's generation_kwargs. chat: requests go through the model's chat
    template. batch_tokens: tokens of a batch."""

    limit: int | None
    shots: int | None
    generation: str
    chat: bool
    batch_tokens: int
    seed: int


class Tasks:
    """Tasks of the harness, loaded once for any number of models."""

    def __init__(self, names: Sequence[str], *, include: Sequence[str], data: str):
        """include: folders of YAML files, before the shipped ones; data: where the shipped tasks find their files."""
        for folder in include:
            if not os.path.isdir(folder):
                raise UserError(f"--include_path={folder}: no such folder; give one that holds task files (*.yaml)")
        _prepare()
        manager = _manager(include, names, data)
        chosen = [name for pattern in names for name in _matching(pattern, manager.all_tasks)]
        try:
            self._loaded = manager.load(list(dict.fromkeys(chosen)))
        except UserError:
            raise
        except Exception as error:  # whatever a task file may do wrong, or its data lack
            raise UserError(f"--tasks={','.join(names)}: {_line(error)}") from None
        self._manager, self.names = manager, chosen
        for task in self._loaded["tasks"].values():
            _bound(task)

    def check(self, settings: Settings) -> list[str]:
        """Lines about where examples before questions come from, if these may be questions that are asked. Raises
        UsageError for settings that cannot work with these tasks."""
        from lm_eval import utils

        from t5x_like.evaluation.backend import read_limits

        given = utils.simple_parse_args_string(settings.generation)
        try:
            read_limits(given, seed=settings.seed)
        except UsageError as error:
            raise UsageError(f"--gen_kwargs={settings.generation}: {error}") from None
        return [line for name, task in self._loaded["tasks"].items() for line in _shots(name, task, settings)]

    def of(self, names: Sequence[str]) -> Any:
        """A TaskManager that hands out what is loaded, where lm_eval would load it again for every model."""
        manager = copy.copy(self._manager)
        tasks = {name: task for name, task in self._loaded["tasks"].items() if name in names}
        loaded = self._loaded if list(names) == self.names else {"tasks": tasks, "groups": {}, "group_map": {}}
        manager.load = lambda _: loaded
        return manager

    def evaluate(self, subject: EvaluatedModel, settings: Settings) -> Evaluation:
        import lm_eval

        from t5x_like.evaluation.backend import Backend

        run: Any = lm_eval.simple_evaluate  # a wrapper hides its signature
        backend = Backend(subject, batch_tokens=settings.batch_tokens, seed=settings.seed)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and notes
            found: Any = run(
                backend,
                tasks=self.names,
                task_manager=self.of(self.names),
                limit=settings.limit,
                num_fewshot=settings.shots,
                gen_kwargs=settings.generation or None,
                bootstrap_iters=2,  # of its standard errors only those of groups of means are used
                apply_chat_template=settings.chat,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        metrics = [
            metric
            for name, task in self._loaded["tasks"].items()
            for metric in _metrics(name, task, found["samples"][name])
        ]
        metrics += [
            metric for name in found.get("groups", {}) for metric in _of_group(name, found["groups"][name], found)
        ]
        shots = {name: int(found["n-shot"].get(name, 0)) for name in self._loaded["tasks"]}
        return Evaluation(subject.name, tuple(metrics), shots, backend.truncated, found["samples"])


def nothing(subject: EvaluatedModel) -> Evaluation:
    """What is known of a model that no task was asked of."""
    return Evaluation(subject.name, (), {}, 0, {})


def with_metrics(evaluation: Evaluation, metrics: Sequence[Metric]) -> Evaluation:
    return dataclasses.replace(evaluation, metrics=(*evaluation.metrics, *metrics))


def _bound(task: Any) -> None:
    """Lets a mean that is too large for a float be infinite, where the harness raises."""
    from lm_eval.api import metrics

    def perplexity(items: Sequence[Any]) -> float:
        return _or_infinite(metrics.perplexity, items)

    def weighted_perplexity(items: Sequence[Any]) -> float:
        return _or_infinite(metrics.weighted_perplexity, items)

    ours = {metrics.perplexity: perplexity, metrics.weighted_perplexity: weighted_perplexity}
    aggregates = {name: ours.get(found, found) for name, found in task.aggregation().items()}
    task.aggregation = lambda: aggregates


def _or_infinite(aggregate: Aggregate, items: Sequence[Any]) -> float:
    try:
        return aggregate(items)
    except OverflowError:
        return math.inf


def _shots(name: str, task: Any, settings: Settings) -> Iterator[str]:
    """Whether a task has as many examples as are asked for, besides the question itself."""
    config, own = task.config, task.config.num_fewshot
    shots = own if settings.shots is None or own == 0 else settings.shots  # a task that says 0 keeps it
    if not shots:
        return
    sampled: Any = getattr(task, "fewshot_cfg", None)
    split = getattr(sampled, "split", None)
    given = split is not None or (config.fewshot_config is not None and getattr(sampled, "samples", None) is not None)
    trained = task.has_training_docs() or task.has_validation_docs()
    place = f"its split {split!r}" if split is not None else "its own examples" if given else "its training split"
    if not given and not trained:
        place = f"its split {config.test_split!r}"
    count = len(list(task.fewshot_docs()))
    room = count - (split is not None and split == config.test_split)  # less the question itself
    if shots > room:
        raise UsageError(
            f"--tasks={name}: {shots} examples before each question, and {place} has {count} documents; use "
            f"--num_fewshot={room} or less"
        )
    if not given and not trained:
        yield (
            f"{name}: it has no training split; its {shots} examples are documents of {place}, the question itself may "
            "be among them (fewshot_split of the task names another)"
        )


def _metrics(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    from lm_eval.api import metrics

    better, aggregates = task.higher_is_better(), task.aggregation()
    for cleaned in dict.fromkeys(sample["filter"] for sample in samples):
        mine = [sample for sample in samples if sample["filter"] == cleaned]
        for metric in dict.fromkeys(metric for sample in mine for metric in sample["metrics"]):
            counted = [sample for sample in mine if metric in sample]
            items = tuple(_plain(sample[metric]) for sample in counted)
            theirs = aggregates.get(metric, metrics.mean)
            aggregate: Aggregate = statistics.mean if theirs is metrics.mean else theirs
            yield Metric(
                task=name,
                name=metric,
                filter=cleaned,
                value=float(aggregate(items)),
                error=statistics.error(items, aggregate),
                higher_is_better=better.get(metric),
                items=items,
                documents=tuple(f"{sample['doc_id']}:{sample['doc_hash'][:16]}" for sample in counted),
                aggregate=aggregate,
            )


def _of_group(name: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Metric]:
    """What the harness says of a group: its items are those of its tasks, which have metrics of their own."""
    for key, value in values.items():
        metric, comma, cleaned = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{cleaned}")
        better = found["higher_is_better"].get(name, {}).get(metric)
        known = float(error) if isinstance(error, float) else None
        yield Metric(name, metric, cleaned, float(value), known, better, (), (), statistics.mean)


def _plain(item: Any) -> Any:
    """A number or tuples of plain values, as JSON holds them."""
    item = item.tolist() if hasattr(item, "tolist") else item  # of numpy
    if isinstance(item, list | tuple):
        return tuple(_plain(each) for each in item)
    return float(item) if isinstance(item, bool) else item


def _manager(include: Sequence[str], names: Sequence[str], data: str) -> Any:
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"data": data} if data else {}
    folders: list[str | pathlib.Path] = [SHIPPED, *include]  # the later ones count where two have a task of one name
    local = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if all(_matching(pattern, local.all_tasks, strict=False) for pattern in names):
        return local  # to read the harness's own thousands of files takes seconds
    return TaskManager(include_path=folders, metadata=metadata)


def _matching(pattern: str, known: Sequence[str], *, strict: bool = True) -> list[str]:
    found = fnmatch.filter(known, pattern)
    if not found and strict:
        raise UsageError(f"--tasks={pattern}: no such task; {_nearest(pattern, known)}")
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return hint if len(hint) < 300 else f"{hint[:200]}... and more: docs/evaluation.md says where tasks lie"


def _prepare() -> None:
    """Imports lm_eval, quietly, and keeps it from starting processes: a copy of this one would hold jax's threads."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        import datasets
        import lm_eval
    except ImportError as error:
        missing = (error.name or "lm_eval").partition(".")[0]
        raise UserError(f"tasks need {missing}; pip install 't5x_like[eval]'") from None
    del lm_eval
    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
