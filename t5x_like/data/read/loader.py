"""Reading: a batch that is a pure function of (config, seed, step), from the token cache alone.

Row r of step s is example s * batch_size + r. Example i belongs to a component and has an index within it
(data/read/mixtures.py); index // rows is the epoch and a keyed permutation of that epoch says which row of the
component it is. No state, no iterator: a process reads the rows it wants, in any order. Numpy only.
"""

import collections
import concurrent.futures
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import cache, token_set
from t5x_like.data.config import DataConfig
from t5x_like.data.open_files import OpenFiles, open_files
from t5x_like.data.read import mixtures
from t5x_like.data.read.features import FEATURES, arrays, check
from t5x_like.data.read.interface import Batch, Draw, Reader, Span
from t5x_like.data.read.permutation import permute
from t5x_like.data.token_set import TokenSet
from t5x_like.data.tokenizers import vocabularies

Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class DocumentPlace:
    """A document (or a part of it) in a batch: where it lies in the batch and in its source.

    offset: where the document begins in its file, counted in `unit`s; text_byte: bytes of its text before what the
    row reads
    """

    row: int
    column: int
    component: str
    file: str
    offset: int
    unit: str
    text_byte: int
    epoch: int


@dataclasses.dataclass(frozen=True)
class Component:
    """One of the sets of a run: its tokens and the rows that are read of them."""

    name: str
    entry: cache.SetEntry
    tokens: TokenSet
    reader: Reader


class TrainData:
    """Opened data: batches to train on, held-out batches, and the vocabulary they are written in.

    `fingerprint` changes when any row of any step does.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: vocabularies.Vocabulary,
        train: list[Component],
        validation: list[Component],
        *,
        unevaluated: dict[str, str],
        seed: int,
    ):
        self.batch_size, self.length, self.vocabulary = config.batch_size, config.length, vocabulary
        self.tokens_per_step = sum(
            math.prod(array.shape) for name, array in arrays(config).items() if name.endswith("inputs")
        )
        self._config, self._seed, self._validation = config, seed, validation
        self._opened = [*train, *validation]
        self._unevaluated = unevaluated  # {name: source} of which nothing was held out
        sizes = {component.name: component.reader.size for component in train}
        rates = mixtures.row_rates(config.mixture, sizes, {c.name: c.entry.rate for c in train})
        self._components = [component for component in train if component.name in rates]
        self._shares = mixtures.shares([rates[component.name] for component in self._components])
        self._slots = mixtures.Slots(self._shares)
        self._sizes = sizes
        self.fingerprint = cache.digest(
            {
                "train": [(c.name, c.tokens.fingerprint) for c in self._components],
                "validation": [(c.name, c.tokens.fingerprint) for c in validation],
                "shares": self._shares,
                "shape": (config.batch_size, config.length, config.validation_stride, config.validation_batches),
                "packing": (config.packing, config.attend_across_documents),
                "seed": seed,
            }
            | _identity(config, cut=any(component.reader.cut for component in self._opened))
        )

    def rows(self, step: int, rows: Int[np.ndarray, "n"]) -> Batch:
        """Rows of the global batch of `step` (from 0), each array [n, ...]; the same whoever asks for them."""
        located = self._locate(step, np.asarray(rows, np.int64))
        parts = [
            (chosen, component.reader.batch(local, Draw(f"{self._seed}/{component.name}", epochs)))
            for component, chosen, local, epochs in located
        ]
        return _gather(parts, len(rows))

    def documents(self, step: int) -> list[DocumentPlace]:
        """Every document in the batch of `step`, row by row."""
        found = [
            _place(component, row, span, int(epoch))
            for component, chosen, local, epochs in self._locate(step, np.arange(self.batch_size))
            for row, packed, epoch in zip(chosen.tolist(), local.tolist(), epochs, strict=True)
            for span in component.reader.documents(packed)
        ]
        return sorted(found, key=lambda place: (place.row, place.column))

    def evaluation_batches(self) -> dict[str, "HeldOut"]:
        """{name of a held-out set: its batches}, the same at every evaluation."""
        return {component.name: HeldOut(component, self._config) for component in self._validation}

    def evaluation(self, name: str) -> "HeldOut":
        batches = self.evaluation_batches()
        if name not in batches:
            raise UserError(
                f"held-out set {name!r} is unknown; {nearest(name, batches) if batches else 'there is none'}"
            )
        return batches[name]

    @property
    def components(self) -> tuple[Component, ...]:
        """All that is read: to train on, then held out."""
        return tuple(self._opened)

    def describe(self, steps: int | None = None) -> dict[str, Any]:
        """Facts for a summary; with `steps`, also how many epochs of each component these will read."""
        total = sum(self._shares)
        components = {}
        for component, share in zip(self._components, self._shares, strict=True):
            facts = _facts(component) | {"share_of_rows": share / total}
            if steps is not None:
                facts["epochs"] = steps * self.batch_size * share / total / self._sizes[component.name].rows
            components[component.name] = facts
        summary: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "tokenizer": {"kind": self.vocabulary.kind, "size": self.vocabulary.size, "loses": self.vocabulary.loses},
            "components": components,
            "validation": {component.name: _facts(component) for component in self._validation},
            "unevaluated": self._unevaluated,
            "tokens_per_step": self.tokens_per_step,
        }
        return summary if steps is None else summary | {"tokens_to_come": steps * self.tokens_per_step}

    def close(self) -> None:
        for component in self._opened:  # those of rate 0 too
            component.tokens.close()

    def _locate(self, step: int, rows: np.ndarray) -> Iterator[tuple[Component, np.ndarray, np.ndarray, np.ndarray]]:
        """(component, indices into `rows`, rows of the component, their epochs)."""
        numbers, indices = self._slots.locate(step * self.batch_size + rows)
        for number in np.unique(numbers):
            component = self._components[number]
            chosen = np.flatnonzero(numbers == number)
            size = self._sizes[component.name].rows
            epochs, positions = np.divmod(indices[chosen], size)
            local = np.zeros_like(positions)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                local[here] = permute(positions[here], size, f"{self._seed}/{component.name}/{epoch}")
            yield component, chosen, local, epochs


class HeldOut:
    """Batches of a held-out set in order; rows behind its end are padding with loss weight 0."""

    def __init__(self, component: Component, config: DataConfig):
        self._component, self._config = component, config
        self._rows = component.reader.size.rows
        whole = -(-self._rows // config.batch_size)
        self._batches = min(whole, config.validation_batches) if config.validation_batches else whole

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> Batch:
        return self.rows(index, np.arange(self._config.batch_size))

    def rows(self, index: int, rows: Int[np.ndarray, "n"]) -> Batch:
        """Some rows of batch `index`."""
        if not 0 <= index < self._batches:
            raise IndexError(index)
        numbers = index * self._config.batch_size + np.asarray(rows, np.int64)
        # Held-out rows draw the same at every evaluation, whatever the seed of the run.
        draw = Draw(f"held out/{self._component.name}", np.zeros_like(numbers))
        batch = self._component.reader.batch(np.minimum(numbers, self._rows - 1), draw)
        for array in batch.values():
            array[numbers >= self._rows] = 0
        return batch


class Prefetch(Generic[Read]):
    """Calls `read(step)` for the next steps in one thread while the caller works on this one.

    What is returned, or raised, for a step is what `read(step)` gives, whatever order steps are asked for.
    """

    def __init__(self, read: Callable[[int], Read], *, ahead: int):
        self._read, self._ahead = read, ahead
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._waiting: collections.OrderedDict[int, concurrent.futures.Future[Read]] = collections.OrderedDict()

    def __call__(self, step: int) -> Read:
        future = self._waiting.pop(step, None)
        wanted = range(step + 1, step + 1 + self._ahead)
        for other in [other for other in self._waiting if other not in wanted]:
            self._waiting.pop(other).cancel()
        if future is None and self._ahead:
            future = self._thread.submit(self._read, step)
        for other in wanted:
            if other not in self._waiting:
                self._waiting[other] = self._thread.submit(self._read, other)
        return self._read(step) if future is None else future.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


def open_data(config: DataConfig, *, cache_dir: str, seed: int, beside: str = "") -> TrainData:
    """Opens what `prepare` wrote in `cache_dir` and `beside` for this config (a bucket is copied to a local disk)."""
    check(config)
    manifest = cache.read_manifest(config, cache_dir, beside=beside)
    folder = cache.local_folder(cache_dir)
    vocabulary = vocabularies.load(str(folder / manifest.tokenizer)).with_chat_template(manifest.chat_template)
    files = open_files()
    opening = (folder, config, vocabulary, files)
    train = [
        _open(name, entry, *opening, stride=config.length, held_out=False)
        for name, entry in sorted(manifest.train.items())
    ]
    stride = config.validation_stride or config.length
    held_out, unevaluated = {}, {}
    for name, entry in sorted(manifest.validation.items()):
        if _has_text(entry, folder):
            held_out[name] = entry
        else:
            unevaluated[name] = entry.source
    if unevaluated and not held_out:
        raise UsageError(
            f"config.data.validation={config.validation!r} holds out no text of any source; "
            "expected some: make it larger, or '' for no evaluation"
        )
    validation = [_open(name, entry, *opening, stride=stride, held_out=True) for name, entry in held_out.items()]
    return TrainData(config, vocabulary, train, validation, unevaluated=unevaluated, seed=seed)


def cuts(config: DataConfig, *, cache_dir: str, beside: str = "") -> dict[str, str]:
    """{set: what of its examples fits no row}, of the sets of a prepared config that have such examples."""
    data = open_data(config, cache_dir=cache_dir, seed=0, beside=beside)
    try:
        facts = data.describe()
        return {name: f["cut"] for part in ("components", "validation") for name, f in facts[part].items() if f["cut"]}
    finally:
        data.close()


def _has_text(entry: cache.SetEntry, folder: pathlib.Path) -> bool:
    """Whether anything of a source was held out: a small share of a few documents may be none of them."""
    return token_set.read_index(folder / entry.folder)["tokens"] >= 2


def _identity(config: DataConfig, *, cut: bool) -> dict[str, Any]:
    """What else decides the rows where they are not a decoder's, or do not hold all of their examples."""
    rule = {"truncate": dataclasses.astuple(config.truncate)} if cut and config.truncate.rule != "end" else {}
    return rule | _identity_of_features(config)


def _identity_of_features(config: DataConfig) -> dict[str, Any]:
    if config.features == "causal":
        return {"prefix": True} if config.prefix else {}
    named = ("features", "encoder_length", "start_token", "extra_ids")
    noise = dataclasses.astuple(config.span_corruption) if config.features == "span_corruption" else ()
    return {name: getattr(config, name) for name in named} | {"noise": noise}


def _open(
    name: str,
    entry: cache.SetEntry,
    folder: pathlib.Path,
    config: DataConfig,
    vocabulary: vocabularies.Vocabulary,
    files: OpenFiles,
    *,
    stride: int,
    held_out: bool,
) -> Component:
    tokens = TokenSet(folder / entry.folder, verify=config.verify, files=files)
    if tokens.tokens < 2:
        raise UserError(f"{entry.source}: no text in it ({tokens.documents} documents, {tokens.tokens} tokens)")
    if "rejected" in tokens.columns and config.features not in ("pairs", "pair_texts"):
        raise UsageError(
            f"config.data.features={config.features!r} reads no pairs (config.data.fields); use 'pairs' or 'pair_texts'"
        )
    reader = FEATURES[config.features].open(tokens, config, vocabulary, stride)
    rows = reader.size.rows
    if held_out and config.validation_batches:
        rows = min(rows, config.validation_batches * config.batch_size)
    if not reader.trained(rows):
        which = f"held-out set {name!r}, {entry.source}" if held_out else entry.source
        raise UserError(
            f"{which}: no token to train on in its rows of {config.length}: the inputs of its {tokens.documents} "
            f"examples leave no room for targets (config.data.truncate.rule={config.truncate.rule!r}); "
            "use 'cut', or a larger config.data.length"
        )
    return Component(name, entry, tokens, reader)


def _place(component: Component, row: int, span: Span, epoch: int) -> DocumentPlace:
    tokens = component.tokens
    file, offset = tokens.place(span.document)
    return DocumentPlace(
        row=row,
        column=span.column,
        component=component.name,
        file=component.entry.files[file],
        offset=offset,
        unit=tokens.unit,
        text_byte=tokens.text_bytes_before(span.document, span.token),
        epoch=epoch,
    )


def _facts(component: Component) -> dict[str, Any]:
    tokens, size, cut = component.tokens, component.reader.size, component.reader.cut
    return {
        "source": component.entry.source,
        "documents": tokens.documents,
        "tokens": tokens.tokens,
        "bytes": tokens.text_bytes,
        "rows": size.rows,
        "truncated": cut.examples,
        "dropped": cut.dropped,
        "cut": str(cut) if cut else "",
        "skipped": tokens.skipped,
        "bad": tokens.bad,
        "empty_files": tokens.empty_files,
    }


def _gather(parts: list[tuple[np.ndarray, Batch]], count: int) -> Batch:
    if len(parts) == 1 and len(parts[0][0]) == count:
        return parts[0][1]
    batch = (
        {key: np.zeros((count, *array.shape[1:]), array.dtype) for key, array in parts[0][1].items()} if parts else {}
    )
    for chosen, part in parts:
        for key, array in part.items():
            batch[key][chosen] = array
    return batch
