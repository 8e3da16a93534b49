"""Whole sequences, one example a row: pairs of answers to a prompt (preferences), and texts with a class.

A pair is read as two texts of a decoder, prompt and answer, each with the loss on the answer and its EOS. Both stand
in one row of the batch, so that they stay together however a batch is divided. A text that is longer than its row
loses its end.
"""

import fractions

import numpy as np
from jaxtyping import Int

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read import causal
from t5x_like.data.read.interface import Batch, Draw, Feature, Span, per_token
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.packing import Rows
from t5x_like.data.token_set import TokenSet

SIDES = ("chosen", "rejected")
_PAIR = {
    "inputs": "int32",
    "targets": "int32",
    "loss_weights": "float32",
    "segment_ids": "int32",
    "positions": "int32",
}
_TEXT = {"inputs": "int32", "positions": "int32", "segment_ids": "int32"}


class Pairs:
    """Row r is pair r of the token set."""

    def __init__(self, token_set: TokenSet, config: DataConfig):
        if "rejected" not in token_set.columns:
            raise UsageError(
                "config.data.features='pairs' needs two answers to each prompt; set config.data.fields.prompt, "
                "config.data.fields.chosen and config.data.fields.rejected"
            )
        self._set, self._width = token_set, config.length + 1
        begins = np.concatenate([[0], token_set.ends[:-1]])
        self._prompts = np.zeros_like(begins) if token_set.inputs is None else token_set.inputs.astype(np.int64)
        rejected = begins + token_set.columns["rejected"]
        self._begins = begins
        # {side: (first token, number of tokens)} of the answers
        self._answers = {
            "chosen": (begins + self._prompts, rejected - begins - self._prompts),
            "rejected": (rejected, token_set.ends - rejected),
        }
        longest = self._prompts + np.maximum(*(count for _, count in self._answers.values()))
        self.truncated = int((longest > self._width).sum())

    @property
    def size(self) -> Size:
        return _one_a_row(self._set)

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        found: Batch = {}
        for side in SIDES:
            read = causal.batch(self._read(np.asarray(rows), side), attend_across_documents=False)
            found |= {f"{side}/{name}": read[name] for name in _PAIR}
        return found

    def documents(self, row: int) -> list[Span]:
        return [Span(row, 0, 0)]

    def _read(self, rows: np.ndarray, side: str) -> Rows:
        prompts = np.minimum(self._prompts[rows], self._width)
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
        columns = np.arange(self._width)
        begins = np.broadcast_to(columns == 0, tokens.shape)
        return Rows(tokens, counts, begins, columns >= prompts[:, None], prompts + answers)


class Labelled:
    """Row r is text r of the token set, with its class."""

    def __init__(self, token_set: TokenSet, config: DataConfig):
        if "labels" not in token_set.columns:
            raise UsageError("config.data.features='labels' needs a class of each text; set config.data.fields.label")
        self._set, self._width = token_set, config.length
        self._begins = np.concatenate([[0], token_set.ends[:-1]])
        lengths = token_set.ends - self._begins
        self.truncated = int((lengths > self._width).sum())
        self._lengths = np.minimum(lengths, self._width)

    @property
    def size(self) -> Size:
        return _one_a_row(self._set)

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        rows = np.asarray(rows)
        lengths, row = self._lengths[rows], np.arange(len(rows))
        shape = (len(rows), self._width)
        tokens, _ = self._set.read(self._begins[rows], lengths, row, np.zeros_like(row), shape)
        columns = np.arange(self._width, dtype=np.int32)
        inside = columns < lengths[:, None]
        return {
            "inputs": tokens,
            "positions": np.where(inside, columns, 0).astype(np.int32),
            "segment_ids": inside.astype(np.int32),
            "labels": self._set.columns["labels"][rows].astype(np.int32),
        }

    def documents(self, row: int) -> list[Span]:
        return [Span(row, 0, 0)]


def _one_a_row(token_set: TokenSet) -> Size:
    mean = fractions.Fraction(token_set.tokens, token_set.documents)
    return Size(token_set.documents, token_set.tokens, token_set.documents, mean)


def _pair_arrays(config: DataConfig) -> dict[str, ArraySpec]:
    return per_token(config, {f"{side}/{name}": kind for side in SIDES for name, kind in _PAIR.items()}, config.length)


def _label_arrays(config: DataConfig) -> dict[str, ArraySpec]:
    return per_token(config, _TEXT, config.length) | {"labels": ArraySpec((config.batch_size,), "int32", ("batch",))}


PAIRS = Feature(
    packings=("single",),
    encoder=False,
    arrays=_pair_arrays,
    open=lambda token_set, config, vocabulary, stride: Pairs(token_set, config),
    check=lambda config: None,
)
LABELS = Feature(
    packings=("single",),
    encoder=False,
    arrays=_label_arrays,
    open=lambda token_set, config, vocabulary, stride: Labelled(token_set, config),
    check=lambda config: None,
)
