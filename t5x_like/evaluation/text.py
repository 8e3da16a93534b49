"""Perplexity and bits per byte of any source of text: the held-out measure of training, on any model.

The source goes through the token cache of training (in a temporary folder) and its rows are those that a run would
hold out: with the `data` section of the model's own run, else rows of the model's length. What is counted is
objectives/lm.py's: natural log-probabilities over scored tokens, bytes of the text that these tokens stand for.
"""

import dataclasses
import functools
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5x_like.core import config as bridge
from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.data import cache
from t5x_like.data.config import NO_CHAT, PLAIN, DataConfig
from t5x_like.data.open_files import open_files
from t5x_like.data.read.features import FEATURES
from t5x_like.data.read.interface import Batch, Draw, Reader, Span
from t5x_like.data.token_set import TokenSet
from t5x_like.data.write import sources
from t5x_like.data.write.prepare import prepare
from t5x_like.evaluation.model import EvaluatedModel
from t5x_like.evaluation.results import Item, Metric
from t5x_like.evaluation.statistics import RatioOfSums, error
from t5x_like.inference.score import batch_shards
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models.model import Model
from t5x_like.objectives.lm import HELD_OUT
from t5x_like.parallel.sharding import constrain, named, use_rules

BLOCK = 4096  # bytes of text that are one observation: the same text for any tokenizer
_DIGITS = 16  # hexadecimal, of the fingerprint of a source
_ENDINGS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_ENDINGS |= {".arrow": "arrow"}


@dataclasses.dataclass(frozen=True)
class _Totals:
    """Of one observation: minus the sum of log-probabilities, scored tokens, bytes of their text, best tokens."""

    loss: float
    tokens: float
    text_bytes: float
    best: float


def source_of(text: str) -> str:
    """`KIND:PATH` of what was given: that, or a path whose ending says the kind."""
    if text.partition(":")[0] in sources.KINDS:
        return text
    name = text.lower()
    for packed in (".gz", ".zst", ".bz2", ".xz"):
        name = name.removesuffix(packed)
    return f"{_ENDINGS.get(os.path.splitext(name)[1], 'text')}:{text}"


def config_of(
    subject: EvaluatedModel,
    section: Mapping[str, Any] | None,
    source: str,
    *,
    usual: Mapping[str, Any],
    length: int | None = None,
) -> DataConfig:
    """How a run of this model would hold out the source. section: the `data` section of its own run, None without;
    usual: that of configs/common, which is then taken with rows of the model's length. length: of rows, in place of
    what these say: a token has at most so many before it, and models compare where they read alike."""
    if section is None:
        if subject.has_encoder:
            raise UsageError(
                f"{subject.name}: a text becomes sources and targets as the config of a run says, and this model came "
                "without one; evaluate it on --tasks, or give a workdir"
            )
        section = {**usual, "length": subject.max_length}
    config = bridge.build(DataConfig, section, path="config.data")
    documents = config.features in ("causal", "span_corruption")
    documents = documents and (bool(config.fields.messages) or not config.fields.targets)
    plain = {"features": "causal", "fields": PLAIN, "chat": NO_CHAT, "packing": "concatenate"}
    change: dict[str, Any] = {} if documents else plain
    if not documents and subject.has_encoder:
        raise UsageError(f"{subject.name}: its run read examples, not texts; evaluate it on --tasks")
    change |= {"source": source, "mixture": dataclasses.replace(config.mixture, sources={}, rates={})}
    if length is not None:
        if length > subject.max_length:
            raise UsageError(
                f"--length={length} is more than max_length={subject.max_length} of {subject.name}; use that or less"
            )
        change |= {"length": length, "validation_stride": min(config.validation_stride or length, length)}
    change |= {"validation": "", "cache": "", "prefix": False, "extra_ids": subject.vocabulary.extra_ids}
    return dataclasses.replace(config, **change)


def measure(subject: EvaluatedModel, config: DataConfig, *, name: str, batch_tokens: int) -> list[Metric]:
    """Metrics of the source of `config` under the task `name`.

    Documents are known by the content of the whole source and their place in it: not by place alone, at which another
    text may stand tomorrow, nor by their own content alone, which several may share.
    """
    with tempfile.TemporaryDirectory(prefix="t5x_like-text-") as folder:
        saved = os.path.join(folder, "tokenizer")
        subject.vocabulary.save(saved)
        prepared = prepare(config, os.path.join(folder, "cache"), report=None, tokenizer=saved)
        found: dict[str, _Totals] = {}
        for part, entry in sorted(prepared.manifest.train.items()):
            place = cache.local_folder(os.path.join(folder, "cache")) / entry.folder
            rows = _Rows(subject, config, place)
            for key, totals in rows.observations(batch_tokens):
                key = f"{prepared.contents[part][:_DIGITS]}:{key}"
                key = f"{part}/{key}" if len(prepared.contents) > 1 else key
                found[key] = _plus(found[key], totals) if key in found else totals
    return _metrics(name, found)


class _Rows:
    """The held-out rows of one token set, as observations."""

    def __init__(self, subject: EvaluatedModel, config: DataConfig, folder: pathlib.Path):
        self._subject, self._config = subject, config
        self._set = TokenSet(folder, verify=False, files=open_files())
        stride = config.validation_stride or config.length
        self._reader: Reader = FEATURES[config.features].open(self._set, config, subject.vocabulary, stride)

    def observations(self, batch_tokens: int) -> Iterator[tuple[str, _Totals]]:
        shards = batch_shards(self._subject.model, self._subject.mesh)
        length = self._config.length + self._config.encoder_length
        rows = max(1, batch_tokens // (length * shards)) * shards
        total = self._reader.size.rows
        waiting: tuple[np.ndarray, Batch, Any] | None = None
        for begin in range(0, total, rows):
            numbers = begin + np.arange(rows)
            batch = self._reader.batch(
                np.minimum(numbers, total - 1), Draw("held out/validation", np.zeros_like(numbers))
            )
            for array in batch.values():
                array[numbers >= total] = 0
            scores = _start(self._subject, batch)
            if waiting is not None:  # the host sums one batch while the device computes the next
                yield from self._sums(*waiting)
            waiting = (numbers, batch, scores)
        if waiting is not None:
            yield from self._sums(*waiting)
        self._set.close()

    def _sums(self, numbers: np.ndarray, batch: Batch, scores: Any) -> Iterator[tuple[str, _Totals]]:
        logp_BT, best_BT = (np.asarray(array) for array in scores)
        for row, number in enumerate(numbers.tolist()):
            weights = batch["loss_weights"][row].astype(np.float64)
            if not weights.any():
                continue
            counted = np.stack([-logp_BT[row] * weights, weights, batch["target_bytes"][row], best_BT[row] * weights])
            if self._config.features != "causal":
                yield str(number), _Totals(*counted.sum(axis=1).tolist())
                continue
            for span, first, last in _spans(self._reader.documents(number), weights.size):
                yield from self._blocks(span, counted[:, first:last], first)

    def _blocks(self, span: Span, counted: np.ndarray, first: int) -> Iterator[tuple[str, _Totals]]:
        """The targets of one document in a row, by the block of its text in which each begins."""
        silent = int(np.argmax(counted[1] > 0))  # what the row before has scored
        counted = counted[:, silent:]
        token = span.token + first + silent + 1 - span.column  # of the document: what the first target is
        begin = self._set.text_bytes_before(span.document, token)
        places = begin + np.concatenate([[0], np.cumsum(counted[2])[:-1]])
        blocks = (places // BLOCK).astype(np.int64)
        file, offset = self._set.place(span.document)
        for block in np.unique(blocks):
            totals = counted[:, blocks == block].sum(axis=1)
            yield f"{file}:{offset}:{block}", _Totals(*totals.tolist())


def _spans(spans: Sequence[Span], length: int) -> Iterator[tuple[Span, int, int]]:
    """(document, first target, last target + 1): target t of a row is the token in column t + 1."""
    ends = [span.column for span in spans[1:]] + [length + 1]
    for span, end in zip(spans, ends, strict=True):
        first, last = max(span.column, 1) - 1, end - 1
        if first < last:
            yield span, first, last


def _start(subject: EvaluatedModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
    model, mesh = subject.model, subject.mesh
    read = {name: array for name, array in batch.items() if name in (*model.inputs, "targets")}
    if mesh is None:
        return _scores(model, subject.params, {name: jnp.asarray(array) for name, array in read.items()})
    placed = {}
    for name, array in read.items():
        sharding = named(mesh, model.rules, ("batch", "length"), array.shape)
        placed[name] = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    with jax.set_mesh(mesh):
        return _scores(model, subject.params, placed)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: Model, params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    read = {name: array for name, array in batch.items() if name in model.inputs}
    hidden_BTD, head = model.score_input(params, model.apply(params, read))
    scores = token_scores(hidden_BTD, head, batch["targets"], want=HELD_OUT)
    with use_rules(model.rules):
        return constrain(scores.logp, None, None), constrain(scores.best == batch["targets"], None, None)


def _plus(a: _Totals, b: _Totals) -> _Totals:
    return _Totals(a.loss + b.loss, a.tokens + b.tokens, a.text_bytes + b.text_bytes, a.best + b.best)


def _metrics(task: str, found: Mapping[str, _Totals]) -> list[Metric]:
    documents, totals = tuple(found), list(found.values())

    def metric(name: str, top: str, bottom: str, aggregate: Any, better: bool) -> Metric:
        items: tuple[Item, ...] = tuple((getattr(each, top), getattr(each, bottom)) for each in totals)
        value, spread = aggregate(items), error(items, aggregate)
        return Metric(task, name, "none", value, spread, better, items, documents, aggregate)

    return [
        metric("bits_per_byte", "loss", "text_bytes", bits, False),
        metric("loss", "loss", "tokens", ratio, False),
        metric("perplexity", "loss", "tokens", perplexity, False),
        metric("accuracy", "best", "tokens", ratio, True),
    ]


def _perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


ratio = RatioOfSums(lambda value: value)
bits = RatioOfSums(lambda loss: loss / math.log(2))
perplexity = RatioOfSums(_perplexity)
