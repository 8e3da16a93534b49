"""Examples with inputs and targets as an encoder-decoder reads them: packed sources beside packed targets.

A row holds whole examples. Example j of a row is segment j of the encoder row and of the decoder row, so cross
attention sees the source of its own example. Source and target both end with EOS, as in T5 (arXiv 1910.10683); the
decoder reads its targets moved right by one within each example, behind the start token.
"""

import fractions

import numpy as np
from jaxtyping import Int

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read.interface import Batch, Draw, Feature, Span, per_token
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.packing import begins_with, ranges
from t5x_like.data.read.truncation import fit_apart
from t5x_like.data.token_set import TokenSet
from t5x_like.data.tokenizers.vocabularies import Vocabulary

ENCODER = {"encoder_inputs": "int32", "encoder_segment_ids": "int32", "encoder_positions": "int32"}
_DECODER = {
    "inputs": "int32",
    "targets": "int32",
    "loss_weights": "float32",
    "segment_ids": "int32",
    "positions": "int32",
    "target_bytes": "int32",
}


def arrays(config: DataConfig) -> dict[str, ArraySpec]:
    return per_token(config, ENCODER, config.encoder_length) | per_token(config, _DECODER, config.length)


def start_id(name: str, vocabulary: Vocabulary) -> int:
    """The id of a config.data.start_token: "pad" is 0, the id of padding, with which T5's decoder begins."""
    found = {"pad": 0, "bos": vocabulary.bos_id, "eos": vocabulary.eos_id}
    token = int(name) if name.isdecimal() else found.get(name)
    if token is None or token >= vocabulary.size:
        raise UsageError(
            f"config.data.start_token={name!r} is no token of the {vocabulary.kind} tokenizer; "
            f"expected pad, bos or eos (if it has one), or an id below {vocabulary.size}"
        )
    return token


class Packed:
    """Rows of whole examples, `encoder_length` source and `length` target tokens at most; what is longer is cut as
    config.data.truncate says, a source keeping BOS and EOS if it loses its begin. An example without inputs has EOS
    alone as its source."""

    def __init__(self, token_set: TokenSet, config: DataConfig, vocabulary: Vocabulary):
        if token_set.inputs is None:
            raise UsageError(
                "config.data.features='source_target' needs examples, and no document here has inputs; "
                "set config.data.fields.inputs and config.data.fields.targets"
            )
        assert vocabulary.eos_id is not None, "a vocabulary that documents were written with has an end token"
        self._set, self._start = token_set, start_id(config.start_token, vocabulary)
        self._widths = config.encoder_length, config.length
        self._ends = vocabulary.bos_id, vocabulary.eos_id
        self._begins = np.concatenate([[0], token_set.ends[:-1]])
        read = token_set.inputs.astype(np.int64)  # source tokens in the cache, which has no EOS behind them
        fitted = fit_apart(read + 1, token_set.ends - self._begins - read, self._widths, config.truncate)
        self.cut, self._skipped = fitted.cut, fitted.skipped
        self._lengths = np.stack([fitted.inputs, fitted.targets])
        self._read = np.minimum(read - fitted.skipped, self._widths[0])
        kept = np.flatnonzero(fitted.kept)
        if config.packing == "single":
            order, self._edges = np.arange(len(kept)), np.arange(len(kept) + 1)
        else:
            order, self._edges = best_fit_of_two(self._lengths[:, kept], self._widths)
        self._order = kept[order]

    @property
    def size(self) -> Size:
        rows, tokens = len(self._edges) - 1, int(self._lengths[:, self._order].sum())
        return Size(len(self._order), tokens, rows, fractions.Fraction(tokens, max(rows, 1)))

    def trained(self, rows: int) -> int:
        return int(self._lengths[1, self._order[: self._edges[rows]]].sum())

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        first, held = self._edges[rows], np.diff(self._edges)[rows]
        examples = self._order[ranges(first, held)]
        row = np.repeat(np.arange(len(rows)), held)
        number = np.arange(len(examples)) - np.repeat(np.cumsum(held) - held, held)
        columns = self._columns(examples, held)
        begins, sources = self._begins[examples], self._read[examples]
        skipped = self._skipped[examples]
        lengths = self._lengths[0, examples]
        tokens = source_tokens(
            self._set, (begins, skipped, sources, lengths), (row, columns[0]), (len(rows), self._widths[0]), self._ends
        )
        segments, positions = _segments(row, number, columns[0], lengths, tokens.shape)
        encoder = {"encoder_inputs": tokens, "encoder_segment_ids": segments, "encoder_positions": positions}

        assert self._set.inputs is not None
        begins, lengths = begins + self._set.inputs[examples], self._lengths[1, examples]
        targets, counts = self._set.read(begins, lengths, row, columns[1], (len(rows), self._widths[1]))
        segments, positions = _segments(row, number, columns[1], lengths, targets.shape)
        return encoder | decoder_arrays(targets, counts, segments, positions, self._start)

    def documents(self, row: int) -> list[Span]:
        """`column`: of the decoder row."""
        examples = self._order[self._edges[row] : self._edges[row + 1]]
        columns = self._columns(examples, np.array([len(examples)]))[1]
        return [Span(example, column, 0) for example, column in zip(examples.tolist(), columns.tolist(), strict=True)]

    def _columns(self, examples: np.ndarray, held: np.ndarray) -> np.ndarray:
        """[2, examples]: where each begins in its encoder and its decoder row; rows hold `held` of them."""
        lengths = self._lengths[:, examples]
        before = np.cumsum(lengths, axis=1) - lengths
        return before - np.repeat(before[:, np.cumsum(held) - held], held, axis=1)


def source_tokens(
    token_set: TokenSet,
    examples: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    places: tuple[np.ndarray, np.ndarray],
    shape: tuple[int, int],
    ends: tuple[int | None, int],
) -> Int[np.ndarray, "n S"]:
    """The rows of an encoder: sources as the cache has them, and EOS behind each that is there to its end.

    examples: (first token in the set, tokens of it that are skipped, tokens that are read, tokens with EOS) of each;
    places: (row, column); ends: (BOS, or None; EOS). A source that loses its begin keeps BOS, if it has one.
    """
    begins, skipped, read, lengths = examples
    row, column = places
    bos, eos = ends
    tokens, _ = token_set.read(begins + skipped, read, row, column, shape)
    if bos is not None:
        cut = (skipped > 0) & (read > 0) & begins_with(token_set, begins, bos)
        tokens[row[cut], column[cut]] = bos
    ended = read < lengths
    tokens[row[ended], (column + read)[ended]] = eos
    return tokens


def decoder_arrays(
    targets: np.ndarray, counts: np.ndarray, segments: np.ndarray, positions: np.ndarray, start: int
) -> Batch:
    """The decoder's arrays: inputs are the targets moved right by one in each segment, behind the start token."""
    inside = segments > 0
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    inputs[positions == 0] = start
    return {
        "inputs": np.where(inside, inputs, 0),
        "targets": targets,
        "loss_weights": inside.astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
        "target_bytes": np.where(inside, counts, 0).astype(np.int32),
    }


def _segments(
    row: np.ndarray, number: np.ndarray, column: np.ndarray, lengths: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(segment ids, positions) of examples, the first of a row being segment 1."""
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    rows, columns = np.repeat(row, lengths), ranges(column, lengths)
    segments[rows, columns] = np.repeat(number + 1, lengths)
    positions[rows, columns] = ranges(np.zeros_like(lengths), lengths)
    return segments, positions


def best_fit_of_two(lengths: Int[np.ndarray, "2 examples"], widths: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(examples in row order, edges), as `packing.best_fit` of one length: an example goes to the row with the least
    room of the first kind among those that hold it, and of these to that with the least room of the second kind."""
    open_rows: dict[tuple[int, int], list[int]] = {}
    rooms = [0] * (widths[0] + 1)  # for each room of the first kind: bits of the rooms of the second kind
    most = np.full(widths[0] + 1, -1)  # ... and the highest of these bits
    row_of = np.zeros(lengths.shape[1], np.int64)
    rows = 0
    for example, (length, other) in enumerate(lengths.T.tolist()):
        fits = most[length:] >= other
        left = length + int(fits.argmax())
        if fits[left - length]:
            fitting = rooms[left] >> other
            beside = other + (fitting & -fitting).bit_length() - 1
            waiting = open_rows[left, beside]
            row = waiting.pop()
            if not waiting:
                rooms[left] &= ~(1 << beside)
                most[left] = rooms[left].bit_length() - 1
        else:
            (left, beside), row, rows = widths, rows, rows + 1
        row_of[example] = row
        left, beside = left - length, beside - other
        if left and beside:
            open_rows.setdefault((left, beside), []).append(row)
            rooms[left] |= 1 << beside
            most[left] = rooms[left].bit_length() - 1
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(rows + 1))


SOURCE_TARGET = Feature(
    packings=("examples", "single"),
    encoder=True,
    arrays=arrays,
    open=lambda token_set, config, vocabulary, stride: Packed(token_set, config, vocabulary),
    check=lambda config: None,
)
