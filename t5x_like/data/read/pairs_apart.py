"""Pairs of answers as an encoder-decoder reads them: the prompt is the source of both, each answer a decoder row.

A source ends with EOS, as in data/read/source_target.py. Of a pair with targets (`pairs`) the decoder reads an answer
moved right by one, behind the start token. Of one without (`pair_texts`) it reads the start token and the whole answer,
its EOS included, so that the last token of a row is the end of the answer.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from t5x_like.core.types import ArraySpec
from t5x_like.data import reference_logp
from t5x_like.data.config import DataConfig
from t5x_like.data.read.interface import Batch, Draw, Feature, Reader, Span, per_token
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.sequences import (
    PAIR_ARRAYS,
    SIDES,
    TEXT_ARRAYS,
    Pairs,
    PairTexts,
    StoredPairs,
    kept,
    one_a_row,
    text_arrays,
)
from t5x_like.data.read.source_target import ENCODER, decoder_arrays, source_tokens, start_id
from t5x_like.data.read.truncation import fit_apart
from t5x_like.data.token_set import TokenSet
from t5x_like.data.tokenizers.vocabularies import Vocabulary


class PairsApart:
    """A row is a pair of the token set, cut to `encoder_length` tokens of its prompt and `length` of the decoder."""

    def __init__(self, token_set: TokenSet, config: DataConfig, vocabulary: Vocabulary, *, targets: bool):
        assert vocabulary.eos_id is not None, "a vocabulary that documents were written with has an end token"
        stored = StoredPairs.of(token_set, config)
        self._set, self._stored, self._targets = token_set, stored, targets
        self._ends, self._start = (vocabulary.bos_id, vocabulary.eos_id), start_id(config.start_token, vocabulary)
        # Without targets the start token takes a place in the row.
        self._widths = config.encoder_length, config.length - (not targets)
        self._length = config.length
        self._fitted = fit_apart(stored.prompts + 1, stored.longest, self._widths, config.truncate)
        self._kept, self.cut = kept(self._fitted)
        self.reference: np.ndarray | None = None  # as in Pairs

    @property
    def size(self) -> Size:
        return one_a_row(self._set, self._kept)

    def trained(self, rows: int) -> int:
        pairs = self._kept[:rows]
        return int(sum(np.minimum(count[pairs], self._widths[1]).sum() for _, count in self._stored.answers.values()))

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch:
        del draw
        pairs = self._kept[np.asarray(rows)]
        read = self._answers if self._targets else self._texts
        sides = {f"{side}/{name}": array for side in SIDES for name, array in read(pairs, side).items()}
        return self._sources(pairs) | sides | reference_logp.of_rows(self.reference, rows)

    def documents(self, row: int) -> list[Span]:
        pair = int(self._kept[row])
        return [Span(pair, 0, int(self._fitted.skipped[pair]))]

    def _sources(self, pairs: np.ndarray) -> Batch:
        skipped, lengths = self._fitted.skipped[pairs], self._fitted.inputs[pairs]
        read = np.minimum(self._stored.prompts[pairs] - skipped, self._widths[0])
        row = np.arange(len(pairs))
        examples = (self._stored.begins[pairs], skipped, read, lengths)
        places, shape = (row, np.zeros_like(row)), (len(pairs), self._widths[0])
        arrays = text_arrays(source_tokens(self._set, examples, places, shape, self._ends), lengths)
        return {f"encoder_{name}": array for name, array in arrays.items()}

    def _answers(self, pairs: np.ndarray, side: str) -> Batch:
        targets, counts, lengths = self._read(pairs, side, first_column=0)
        of_row = text_arrays(targets, lengths)
        arrays = decoder_arrays(targets, counts, of_row["segment_ids"], of_row["positions"], self._start)
        return {name: arrays[name] for name in PAIR_ARRAYS}

    def _texts(self, pairs: np.ndarray, side: str) -> Batch:
        tokens, _, lengths = self._read(pairs, side, first_column=1)
        tokens[:, 0] = self._start
        return text_arrays(tokens, lengths + 1)

    def _read(self, pairs: np.ndarray, side: str, *, first_column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, bytes that they stand for, tokens of each answer); answers begin in this column."""
        first, count = (column[pairs] for column in self._stored.answers[side])
        lengths, row = np.minimum(count, self._widths[1]), np.arange(len(pairs))
        shape = (len(pairs), self._length)
        return *self._set.read(first, lengths, row, np.full_like(row, first_column), shape), lengths


def _arrays(config: DataConfig, names: Mapping[str, str]) -> dict[str, ArraySpec]:
    encoder = per_token(config, ENCODER, config.encoder_length) if config.encoder_length else {}
    sided = {f"{side}/{name}": kind for side in SIDES for name, kind in names.items()}
    return encoder | per_token(config, sided, config.length)


def _open_pairs(token_set: TokenSet, config: DataConfig, vocabulary: Vocabulary, stride: int) -> Reader:
    if config.encoder_length:
        return PairsApart(token_set, config, vocabulary, targets=True)
    return Pairs(token_set, config, width=config.length + 1, bos=vocabulary.bos_id)


def _open_texts(token_set: TokenSet, config: DataConfig, vocabulary: Vocabulary, stride: int) -> Reader:
    if config.encoder_length:
        return PairsApart(token_set, config, vocabulary, targets=False)
    return PairTexts(token_set, config, width=config.length, bos=vocabulary.bos_id)


PAIRS = Feature(
    packings=("single",),
    encoder=None,
    arrays=lambda config: _arrays(config, PAIR_ARRAYS),
    open=_open_pairs,
    check=lambda config: None,
)
PAIR_TEXTS = Feature(
    packings=("single",),
    encoder=None,
    arrays=lambda config: _arrays(config, TEXT_ARRAYS),
    open=_open_texts,
    check=lambda config: None,
)
