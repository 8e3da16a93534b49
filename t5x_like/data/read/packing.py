"""Packing: which tokens of a token set form row r of a decoder. An index into the cache, no copy of it.

`Concatenated`: one stream of all documents, rows of T+1 tokens that begin every `stride` tokens. `BestFit`: whole
examples, each put into the row with the least room that still holds it. Order of rows: data/read/loader.py.
"""

import dataclasses
import fractions
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int

from t5x_like.data.config import TruncateConfig
from t5x_like.data.read.interface import Span
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.truncation import Cut, fit
from t5x_like.data.token_set import TokenSet


@dataclasses.dataclass(frozen=True)
class Rows:
    """n rows of T+1 tokens.

    tokens, byte_counts: zero behind the last token of a row; begins: where a document begins; trained: tokens that
    are predicted with loss (the first of a row never is); valid: tokens of each row.
    """

    tokens: Int[np.ndarray, "n width"]
    byte_counts: Int[np.ndarray, "n width"]
    begins: Bool[np.ndarray, "n width"]
    trained: Bool[np.ndarray, "n width"]
    valid: Int[np.ndarray, "n"]


class Packing(Protocol):
    """Rows of one token set. `cut`: what of its examples did not fit; `trained(rows)`: tokens with loss in the first
    `rows` rows (of a conversation, those from the first of these on)."""

    cut: Cut

    @property
    def size(self) -> Size: ...

    def trained(self, rows: int) -> int: ...

    def read(self, rows: Int[np.ndarray, "n"]) -> Rows: ...

    def documents(self, row: int) -> list[Span]: ...


class Concatenated:
    """Rows of T+1 tokens with stride T: every token but the very first is a target exactly once.

    A smaller stride makes rows overlap; then a row only predicts what the one before has not. The last row is padded.
    """

    cut = Cut()

    def __init__(self, token_set: TokenSet, *, length: int, stride: int):
        self._set, self._length, self._stride = token_set, length, stride
        self.rows = 1 + max(0, -(-(token_set.tokens - 1 - length) // stride))

    @property
    def size(self) -> Size:
        return Size(self._set.documents, self._set.tokens, self.rows, fractions.Fraction(self._length))

    def trained(self, rows: int) -> int:
        begins = np.concatenate([[0], self._set.ends[:-1]])
        first = begins if self._set.inputs is None else begins + self._set.inputs
        last = np.minimum(self._set.ends, (rows - 1) * self._stride + self._length + 1)
        return int(np.maximum(last - np.maximum(first, 1), 0).sum())

    def read(self, rows: Int[np.ndarray, "n"]) -> Rows:
        starts = np.asarray(rows, np.int64) * self._stride
        width = self._length + 1
        valid = np.minimum(self._set.tokens - starts, width)
        spans = np.arange(len(starts))
        tokens, counts = self._set.read(starts, valid, spans, np.zeros_like(spans), (len(starts), width))
        begins = np.zeros((len(starts), width), bool)
        first, last = (np.searchsorted(self._set.ends, edge) for edge in (starts, starts + valid))
        inside = ranges(first, last - first)
        row = np.repeat(spans, last - first)
        begins[row, self._set.ends[inside] - starts[row]] = True
        trained = np.ones((len(starts), width), bool)
        if self._set.inputs is not None:
            trained = self._behind_inputs(starts, begins)
        if self._set.marks_trained:
            trained &= self._set.read_trained(starts, valid, spans, np.zeros_like(spans), trained.shape)
        trained[starts > 0, : width - self._stride] = False
        return Rows(tokens, counts, begins, trained, valid)

    def documents(self, row: int) -> list[Span]:
        start = row * self._stride
        return spans_between(self._set, start, start + self._length)

    def _behind_inputs(self, starts: np.ndarray, begins: np.ndarray) -> np.ndarray:
        assert self._set.inputs is not None
        later = begins.copy()
        later[:, 0] = False
        document = np.searchsorted(self._set.ends, starts, side="right")[:, None] + np.cumsum(later, axis=1)
        document = np.minimum(document, self._set.documents - 1)
        begin = np.where(document > 0, self._set.ends[document - 1], 0)
        return starts[:, None] + np.arange(begins.shape[1]) - begin >= self._set.inputs[document]


class BestFit:
    """Rows of whole examples, at most T+1 tokens together; a longer example is cut as `truncate` says, and keeps the
    token `bos` at its begin. The first token of an example is never predicted."""

    def __init__(self, token_set: TokenSet, *, length: int, truncate: TruncateConfig, bos: int | None):
        self._set, self._width, self._bos = token_set, length + 1, bos
        begins = np.concatenate([[0], token_set.ends[:-1]])
        inputs = np.zeros_like(begins) if token_set.inputs is None else token_set.inputs.astype(np.int64)
        fitted = fit(inputs, token_set.ends - begins - inputs, self._width, truncate)
        self.cut, self._skipped = fitted.cut, fitted.skipped
        self._begins, self._lengths, self._inputs = (
            begins + fitted.skipped,
            fitted.inputs + fitted.targets,
            fitted.inputs,
        )
        self._targets = begins + inputs
        self._silent = np.clip(fitted.inputs, 1, self._lengths)
        kept = np.flatnonzero(fitted.kept)
        order, self._edges = best_fit(self._lengths[kept], self._width)
        self._order = kept[order]

    @property
    def size(self) -> Size:
        rows, tokens = len(self._edges) - 1, int(self._lengths[self._order].sum())
        return Size(len(self._order), tokens, rows, fractions.Fraction(tokens, max(rows, 1)))

    def trained(self, rows: int) -> int:
        examples = self._order[: self._edges[rows]]
        return int((self._lengths[examples] - self._silent[examples]).sum())

    def read(self, rows: Int[np.ndarray, "n"]) -> Rows:
        first, held = self._edges[rows], np.diff(self._edges)[rows]
        examples = self._order[ranges(first, held)]
        row = np.repeat(np.arange(len(rows)), held)
        lengths = self._lengths[examples]
        before = np.cumsum(lengths) - lengths
        column = before - before[np.cumsum(held) - held][row]
        shape = (len(rows), self._width)
        spans = self._spans(examples, row, column)
        tokens, counts = self._set.read(*spans, shape)
        if self._bos is not None:
            cut = np.flatnonzero((self._skipped[examples] > 0) & (self._inputs[examples] > 0))
            cut = cut[begins_with(self._set, (self._begins - self._skipped)[examples[cut]], self._bos)]
            tokens[row[cut], column[cut]], counts[row[cut], column[cut]] = self._bos, 0
        begins = np.zeros(shape, bool)
        trained = self._set.read_trained(*spans, shape) if self._set.marks_trained else np.ones(shape, bool)
        begins[row, column] = True
        silent = self._silent[examples]
        trained[np.repeat(row, silent), ranges(column, silent)] = False
        valid = np.bincount(row, weights=lengths, minlength=len(rows)).astype(np.int64)
        return Rows(tokens, counts, begins, trained, valid)

    def _spans(
        self, examples: np.ndarray, row: np.ndarray, column: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(first tokens, numbers of tokens, rows, columns) of what is read: two spans for inputs without their end."""
        begins, lengths, inputs = self._begins[examples], self._lengths[examples], self._inputs[examples]
        targets = self._targets[examples]
        apart = begins + inputs < targets
        first = np.where(apart, inputs, lengths)
        more = (targets[apart], (lengths - inputs)[apart], row[apart], (column + inputs)[apart])
        spans = zip((begins, first, row, column), more, strict=True)
        starts, counts, rows, columns = (np.concatenate(parts) for parts in spans)
        return starts, counts, rows, columns

    def documents(self, row: int) -> list[Span]:
        examples = self._order[self._edges[row] : self._edges[row + 1]]
        lengths = self._lengths[examples]
        places = (examples, np.cumsum(lengths) - lengths, self._skipped[examples])
        return [Span(*place) for place in zip(*(array.tolist() for array in places), strict=True)]


def begins_with(token_set: TokenSet, first: Int[np.ndarray, "n"], token: int) -> Bool[np.ndarray, "n"]:
    """Whether each of these texts, which begin at so many tokens, begins with a token: a text keeps its BOS when it
    loses its begin, and what a chat template writes may have none."""
    if not len(first):
        return np.zeros(0, bool)
    rows = np.arange(len(first))
    found, _ = token_set.read(first, np.ones_like(rows), rows, np.zeros_like(rows), (len(rows), 1))
    return found[:, 0] == token


PACKINGS = ("concatenate", "examples")


def pack(
    kind: str, token_set: TokenSet, *, length: int, stride: int, truncate: TruncateConfig, bos: int | None
) -> Packing:
    """The packing of a name in PACKINGS."""
    if kind == "concatenate":
        return Concatenated(token_set, length=length, stride=stride)
    return BestFit(token_set, length=length, truncate=truncate, bos=bos)


def spans_between(token_set: TokenSet, first: int, last: int) -> list[Span]:
    """The documents of the tokens from `first` through `last` of the stream of all documents."""
    begin, end = np.searchsorted(token_set.ends, [first, last], side="right").tolist()
    end = min(end, token_set.documents - 1)
    later = [Span(document, token_set.begin(document) - first, 0) for document in range(begin + 1, end + 1)]
    return [Span(begin, 0, first - token_set.begin(begin)), *later]


def best_fit(lengths: Int[np.ndarray, "examples"], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(examples in row order, edges): row r holds order[edges[r]:edges[r + 1]].

    Rows with equal room are used newest first. `room` has one bit for each amount of room that some row has.
    """
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]
    row_of = np.zeros(len(lengths), np.int64)
    room = rows = 0
    for example, length in enumerate(lengths.tolist()):
        fitting = room >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                room &= ~(1 << left)
        else:
            left, row, rows = width, rows, rows + 1
        row_of[example] = row
        if left > length:
            open_rows[left - length].append(row)
            room |= 1 << (left - length)
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(rows + 1))


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (counts[0] of them), first[1], ..."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
