"""Whole sequences, one example a row: pairs of answers to a prompt (preferences), and texts with a class.

A pair is read as two texts of a decoder, prompt and answer: with the loss on the answer and its EOS (`pairs`), or
whole, up to the EOS, for a model that gives a text one number (`pair_texts`). With an encoder the prompt is its source,
which both answers share (data/read/pairs_apart.py). Both texts stand in one row of the batch, so that they stay
together however a batch is divided. What is longer than its row is cut as config.data.truncate says.
"""

import dataclasses
import fractions

import numpy as np
from jaxtyping import Int

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data import reference_logp
from t5x_like.data.config import DataConfig
from t5x_like.data.read import causal
from t5x_like.data.read.interface import Batch, Draw, Feature, Span, per_token
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.packing import Rows, begins_with
from t5x_like.data.read.truncation import Cut, Fitted, fit
from t5x_like.data.token_set import TokenSet

SIDES = ("chosen", "rejected")
PAIR_ARRAYS = {
    "inputs": "int32",
    "targets": "int32",
    "loss_weights": "float32",
    "segment_ids": "int32",
    "positions": "int32",
}
TEXT_ARRAYS = {"inputs": "int32", "positions": "int32", "segment_ids": "int32"}


@dataclasses.dataclass(frozen=True)
class StoredPairs:
    """Where the pairs of a token set stand in it: the first token of each prompt and how many it has, of each side's
    answers the same, and the tokens of the longer answer. One entry a pair."""

    begins: Int[np.ndarray, "pairs"]
    prompts: Int[np.ndarray, "pairs"]
    answers: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, token_set: TokenSet, config: DataConfig) -> "StoredPairs":
        """UsageError for a set of other documents."""
        if "rejected" not in token_set.columns:
            raise UsageError(
                f"config.data.features={config.features!r} needs two answers to each prompt; set "
                "config.data.fields.prompt, config.data.fields.chosen and config.data.fields.rejected"
            )
        begins = np.concatenate([[0], token_set.ends[:-1]])
        prompts = np.zeros_like(begins) if token_set.inputs is None else token_set.inputs.astype(np.int64)
        rejected = begins + token_set.columns["rejected"]
        chosen = begins + prompts, rejected - begins - prompts
        return cls(begins, prompts, {"chosen": chosen, "rejected": (rejected, token_set.ends - rejected)})

    @property
    def longest(self) -> Int[np.ndarray, "pairs"]:
        return np.maximum(*(count for _, count in self.answers.values()))


class Pairs:
    """A row is a pair of the token set; both sides see the same of the prompt. `width`: tokens of a text at most."""

    def __init__(self, token_set: TokenSet, config: DataConfig, *, width: int, bos: int | None):
        stored = StoredPairs.of(token_set, config)
        self._set, self._width, self._bos = token_set, width, bos
        self._answers = stored.answers
        self._fitted = fit(stored.prompts, stored.longest, self._width, config.truncate)
        self._begins, self._kept, self.cut = stored.begins + self._fitted.skipped, *kept(self._fitted)
        self.reference: np.ndarray | None = None  # log-probabilities of each row (data/reference_logp.py)

    @property
    def size(self) -> Size:
        return one_a_row(self._set, self._kept)

    def trained(self, rows: int) -> int:
        pairs = self._kept[:rows]
        room = self._width - self._fitted.inputs[pairs]
        return int(sum(np.minimum(count[pairs], room).sum() for _, count in self._answers.values()))

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        found: Batch = {}
        for side in SIDES:
            read = causal.batch(self._read(np.asarray(rows), side), attend_across_documents=False)
            found |= {f"{side}/{name}": read[name] for name in PAIR_ARRAYS}
        return found | reference_logp.of_rows(self.reference, rows)

    def documents(self, row: int) -> list[Span]:
        pair = int(self._kept[row])
        return [Span(pair, 0, int(self._fitted.skipped[pair]))]

    def _read(self, rows: np.ndarray, side: str) -> Rows:
        rows = self._kept[rows]
        prompts = self._fitted.inputs[rows]
        first, count = (column[rows] for column in self._answers[side])
        answers = np.minimum(count, self._width - prompts)
        row = np.arange(len(rows))
        tokens, counts = self._set.read(
            np.concatenate([self._begins[rows], first]),
            np.concatenate([prompts, answers]),
            np.concatenate([row, row]),
            np.concatenate([np.zeros_like(row), prompts]),
            (len(rows), self._width),
        )
        if self._bos is not None:
            cut = (self._fitted.skipped[rows] > 0) & (prompts > 0)
            cut &= begins_with(self._set, self._begins[rows] - self._fitted.skipped[rows], self._bos)
            tokens[cut, 0], counts[cut, 0] = self._bos, 0
        columns = np.arange(self._width)
        begins = np.broadcast_to(columns == 0, tokens.shape)
        return Rows(tokens, counts, begins, columns >= prompts[:, None], prompts + answers)


class PairTexts(Pairs):
    """The same texts whole, without targets."""

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        found: Batch = {}
        for side in SIDES:
            read = self._read(np.asarray(rows), side)
            found |= {f"{side}/{name}": array for name, array in text_arrays(read.tokens, read.valid).items()}
        return found


class Labelled:
    """A row is a text of the token set, with its class."""

    def __init__(self, token_set: TokenSet, config: DataConfig):
        if "labels" not in token_set.columns:
            raise UsageError("config.data.features='labels' needs a class of each text; set config.data.fields.label")
        self._set, self._width = token_set, config.length
        self._begins = np.concatenate([[0], token_set.ends[:-1]])
        fitted = fit(np.zeros_like(self._begins), token_set.ends - self._begins, self._width, config.truncate)
        self._lengths, self._kept, self.cut = fitted.targets, *kept(fitted)

    @property
    def size(self) -> Size:
        return one_a_row(self._set, self._kept)

    def trained(self, rows: int) -> int:
        return rows

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        rows = self._kept[rows]
        lengths, row = self._lengths[rows], np.arange(len(rows))
        shape = (len(rows), self._width)
        tokens, _ = self._set.read(self._begins[rows], lengths, row, np.zeros_like(row), shape)
        return text_arrays(tokens, lengths) | {"labels": self._set.columns["labels"][rows].astype(np.int32)}

    def documents(self, row: int) -> list[Span]:
        return [Span(int(self._kept[row]), 0, 0)]


def text_arrays(tokens: np.ndarray, lengths: np.ndarray) -> Batch:
    """The arrays TEXT_ARRAYS of rows of one text each, of so many tokens."""
    columns = np.arange(tokens.shape[1], dtype=np.int32)
    inside = columns < lengths[:, None]
    return {
        "inputs": tokens,
        "positions": np.where(inside, columns, 0).astype(np.int32),
        "segment_ids": inside.astype(np.int32),
    }


def kept(fitted: Fitted) -> tuple[np.ndarray, Cut]:
    """(number of the document of each row, what did not fit)."""
    return np.flatnonzero(fitted.kept), fitted.cut


def one_a_row(token_set: TokenSet, kept: np.ndarray) -> Size:
    lengths = np.diff(token_set.ends, prepend=0)[kept]
    tokens = int(lengths.sum())
    return Size(len(kept), tokens, len(kept), fractions.Fraction(tokens, max(len(kept), 1)))


def _label_arrays(config: DataConfig) -> dict[str, ArraySpec]:
    return per_token(config, TEXT_ARRAYS, config.length) | {
        "labels": ArraySpec((config.batch_size,), "int32", ("batch",))
    }


LABELS = Feature(
    packings=("single",),
    encoder=False,
    arrays=_label_arrays,
    open=lambda token_set, config, vocabulary, stride: Labelled(token_set, config),
    check=lambda config: None,
)
