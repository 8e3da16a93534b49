"""Span corruption, T5's pretraining objective (Raffel et al. 2019, arXiv 1910.10683, section 3.1.4), while reading.

The stream of all documents is cut into chunks of plain text. In each, random spans are replaced by sentinels
(<extra_id_0>, <extra_id_1>, ...: the last id of the vocabulary and downward) in the encoder's input, and the decoder
predicts each sentinel with the span it stands for. Counts, order of spans and sentinels are those of
`span_corruption` in google-research/text-to-text-transfer-transformer (t5/data/preprocessors.py); chunks are as long
as its `random_spans_helper` says. Which spans is a pure function of (seed, component, epoch, row), made of integers
alone, so that every epoch sees others and every numpy the same.

Differences to t5: a document keeps its end token (and begin token, where there is one) within a chunk, and counts of
tokens and of spans are rounded in float64 everywhere (t5 rounds those of the mask in float32).
"""

import fractions
import hashlib

import numpy as np
from jaxtyping import Bool, Int

from t5x_like.core.errors import UsageError
from t5x_like.data.config import DataConfig
from t5x_like.data.read import source_target
from t5x_like.data.read.interface import Batch, Draw, Feature, Span
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.packing import spans_between
from t5x_like.data.read.permutation import mix
from t5x_like.data.read.truncation import Cut
from t5x_like.data.token_set import TokenSet
from t5x_like.data.tokenizers.vocabularies import Vocabulary


def noise_counts(length: int, density: float, mean_span_length: float) -> tuple[int, int]:
    """(noise tokens, noise spans) of a chunk of `length` tokens, at least 2 of them."""
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_span_length), 1), length - noise)


def chunk_lengths(encoder_length: int, density: float, mean_span_length: float) -> tuple[int, int]:
    """(tokens of a chunk, its target tokens): the longest chunk whose inputs, with sentinels and EOS, fit.

    >>> chunk_lengths(512, 0.15, 3.0)
    (568, 114)
    """

    def encoded(length: int) -> tuple[int, int]:
        noise, spans = noise_counts(length, density, mean_span_length)
        return length - noise + spans + 1, noise + spans + 1

    length = encoder_length - 1
    while encoded(length + 1)[0] <= encoder_length:
        length += 1
    inputs, targets = encoded(length)
    if density == 0.5 and targets > inputs:  # as in t5: then both have one length
        return length - 1, targets - 1
    return length, targets


def noise_mask(
    length: int, density: float, mean_span_length: float, keys: np.ndarray
) -> Bool[np.ndarray, "n {length}"]:
    """True where a token is noise: spans alternate, the first is not noise. All such masks are equally likely."""
    noise, spans = noise_counts(length, density, mean_span_length)
    keys = keys[:, None]
    noisy, plain = _segmentation(noise, spans, mix(keys)), _segmentation(length - noise, spans, mix(~keys))
    starts = np.cumsum(np.stack([plain, noisy], axis=2).reshape(len(keys), 2 * spans), axis=1)[:, :-1]
    changes = np.zeros((len(keys), length), np.int64)
    np.put_along_axis(changes, starts, 1, axis=1)
    return np.cumsum(changes, axis=1) % 2 == 1


def _segmentation(items: int, segments: int, keys: Int[np.ndarray, "n 1"]) -> Int[np.ndarray, "n {segments}"]:
    """Lengths, at least 1, of `segments` parts of `items` things; each way to divide them is equally likely."""
    drawn = mix(keys + np.arange(1, items, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    last = np.sort(np.argsort(drawn, axis=1, kind="stable")[:, : segments - 1], axis=1)
    edges = np.concatenate([np.full((len(keys), 1), -1), last, np.full((len(keys), 1), items - 1)], axis=1)
    return np.diff(edges, axis=1)


def with_sentinels(
    tokens: Int[np.ndarray, "n length"], counts: Int[np.ndarray, "n length"], mask: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each run of the mask becomes one sentinel: `first` in a row, then the ids below it.

    >>> tokens, mask = np.array([[7, 8, 9, 7, 5]]), np.array([[False, True, True, False, True]])
    >>> with_sentinels(tokens, tokens, mask, 99)[0].tolist(), with_sentinels(tokens, tokens, ~mask, 99)[0].tolist()
    ([[7, 99, 7, 98]], [[99, 8, 9, 98, 5]])
    """
    before = np.zeros_like(mask)
    before[:, 1:] = mask[:, :-1]
    begins = mask & ~before
    replaced = np.where(begins, first + 1 - np.cumsum(begins, axis=1), tokens)
    kept = ~(mask & before)
    return replaced[kept].reshape(len(tokens), -1), np.where(begins, 0, counts)[kept].reshape(len(tokens), -1)


class Corrupted:
    """Chunks of the stream of all documents, one a row; a last chunk of one token is left out."""

    cut = Cut()

    def __init__(self, token_set: TokenSet, config: DataConfig, vocabulary: Vocabulary):
        noise = config.span_corruption
        self._noise = noise.noise_density, noise.mean_span_length
        self._chunk, _ = chunk_lengths(config.encoder_length, *self._noise)
        _, spans = noise_counts(self._chunk, *self._noise)
        if spans > vocabulary.extra_ids:
            raise UsageError(
                f"config.data.encoder_length={config.encoder_length}: span corruption needs {spans} sentinels, the "
                f"tokenizer has {vocabulary.extra_ids}; set config.data.extra_ids={max(100, spans)}"
            )
        assert vocabulary.eos_id is not None, "a vocabulary that documents were written with has an end token"
        self._set, self._eos, self._sentinel = token_set, vocabulary.eos_id, vocabulary.size - 1
        self._start = source_target.start_id(config.start_token, vocabulary)
        self._widths = config.encoder_length, config.length
        self._rows = max(-(-(token_set.tokens - 1) // self._chunk), 1)

    @property
    def size(self) -> Size:
        return Size(self._set.documents, self._set.tokens, self._rows, fractions.Fraction(self._chunk))

    def trained(self, rows: int) -> int:
        """At least two target tokens a row: a sentinel and EOS."""
        return 2 * rows

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        rows = np.asarray(rows, np.int64)
        starts = rows * self._chunk
        valid = np.minimum(self._set.tokens - starts, self._chunk)
        spans = np.arange(len(rows))
        tokens, counts = self._set.read(starts, valid, spans, np.zeros_like(spans), (len(rows), self._chunk))
        keys = _keys(draw, rows)
        shape = len(rows), self._widths[1]
        sources, source_lengths = np.zeros((len(rows), self._widths[0]), np.int32), np.zeros(len(rows), np.int64)
        targets, bytes_, target_lengths = np.zeros(shape, np.int32), np.zeros(shape, np.int32), source_lengths.copy()
        for length in np.unique(valid):  # all chunks but the last one are whole
            chosen = np.flatnonzero(valid == length)
            mask = noise_mask(int(length), *self._noise, keys[chosen])
            part = tokens[chosen, :length], counts[chosen, :length]
            source, _ = with_sentinels(*part, mask, self._sentinel)
            target, target_counts = with_sentinels(*part, ~mask, self._sentinel)
            source_lengths[chosen], target_lengths[chosen] = source.shape[1] + 1, target.shape[1] + 1
            sources[chosen, : source.shape[1]], sources[chosen, source.shape[1]] = source, self._eos
            targets[chosen, : target.shape[1]], targets[chosen, target.shape[1]] = target, self._eos
            bytes_[chosen, : target.shape[1]] = target_counts
        segments, positions = _one_segment(source_lengths, self._widths[0])
        encoder = {"encoder_inputs": sources, "encoder_segment_ids": segments, "encoder_positions": positions}
        segments, positions = _one_segment(target_lengths, self._widths[1])
        return encoder | source_target.decoder_arrays(targets, bytes_, segments, positions, self._start)

    def documents(self, row: int) -> list[Span]:
        """`column`: in the chunk, as it is before spans are replaced."""
        start = row * self._chunk
        return spans_between(self._set, start, start + self._chunk - 1)


def _keys(draw: Draw, rows: np.ndarray) -> np.ndarray:
    """64 random bits a row."""
    names = [f"{draw.stream}/{epoch}/{row}" for epoch, row in zip(draw.epochs.tolist(), rows.tolist(), strict=True)]
    return np.array(
        [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in names], np.uint64
    )


def _one_segment(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    columns = np.arange(width, dtype=np.int32)
    inside = columns < lengths[:, None]
    return inside.astype(np.int32), np.where(inside, columns, 0).astype(np.int32)


def _check(config: DataConfig) -> None:
    noise, where = config.span_corruption, "config.data.span_corruption"
    if not 0 < noise.noise_density < 1:
        raise UsageError(f"{where}.noise_density={noise.noise_density} should lie between 0 and 1, as 0.15")
    if not 1 <= noise.mean_span_length < float("inf"):
        raise UsageError(f"{where}.mean_span_length={noise.mean_span_length} should be at least 1, as 3.0")
    if config.encoder_length < 4:
        raise UsageError(f"config.data.encoder_length={config.encoder_length} should be at least 4 for span corruption")
    _, targets = chunk_lengths(config.encoder_length, noise.noise_density, noise.mean_span_length)
    if config.length < targets:
        raise UsageError(
            f"config.data.length={config.length} is too short for the {targets} target tokens of span corruption with "
            f"encoder_length={config.encoder_length}; set config.data.length={targets}"
        )


SPAN_CORRUPTION = Feature(
    packings=("concatenate",),
    encoder=True,
    arrays=source_target.arrays,
    open=lambda token_set, config, vocabulary, stride: Corrupted(token_set, config, vocabulary),
    check=_check,
)
