"""Answers as rows of a batch: where the tokens of an answer stand in the row that is trained on.

A decoder's row is the prompt followed by the answer; of a model with an encoder the prompt is the source, and the
decoder's row is the answer alone behind its start token. Only the answer carries loss, its end token included.

Names: R rows, T length of a row, S of a source, N the most tokens of an answer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from t5x_like.inference.decode import encoder_batch


@dataclasses.dataclass(frozen=True)
class RowShape:
    """length: tokens of a row (T); source: of an encoder's row (S), 0 without one; start: a decoder's start token;
    source_end: whether a source ends with EOS."""

    length: int
    source: int
    start: int
    source_end: bool = True

    @property
    def text_length(self) -> int:
        """Of the longest prompt and answer as one text, which has no EOS between them."""
        return (self.source - self.source_end if self.source else 1) + self.length


def token_arrays(
    prompts: Sequence[Sequence[int]], answers: Int[np.ndarray, "R N"], lengths: Int[np.ndarray, " R"], shape: RowShape
) -> dict[str, np.ndarray]:
    """{inputs, targets, segment_ids, loss_weights} [R, T], and an encoder's arrays [R, S]."""
    if shape.source:
        before = [[shape.start] for _ in prompts]
        sources, counts = np.zeros((len(prompts), shape.source), np.int32), np.array([len(ids) for ids in prompts])
        for row, ids in enumerate(prompts):
            sources[row, : len(ids)] = ids
        arrays = encoder_batch(sources, counts)
    else:
        before, arrays = prompts, {}
    tokens = np.zeros((len(prompts), shape.length + 1), np.int32)
    held = np.array([len(ids) for ids in before]) + lengths
    for row, (ids, answer, count) in enumerate(zip(before, answers, lengths.tolist(), strict=True)):
        tokens[row, : held[row]] = [*ids, *answer[:count].tolist()]
    inside = np.arange(shape.length)[None, :] < (held - 1)[:, None]
    arrays |= {"inputs": np.where(inside, tokens[:, :-1], 0), "targets": np.where(inside, tokens[:, 1:], 0)}
    weights = on_rows(np.ones(answers.shape, np.float32), lengths, first_targets(prompts, shape), shape.length)
    return arrays | {"segment_ids": inside.astype(np.int32), "loss_weights": weights}


def first_targets(prompts: Sequence[Sequence[int]], shape: RowShape) -> Int[np.ndarray, " R"]:
    """The column of each row whose target is the first token of the answer."""
    return np.array([0 if shape.source else len(ids) - 1 for ids in prompts])


def on_rows(
    values: Float[np.ndarray, "R N"], lengths: Int[np.ndarray, " R"], first: Int[np.ndarray, " R"], length: int
) -> Float[np.ndarray, "R T"]:
    """A number for each token of the answers, at the places of these tokens in rows; 0 elsewhere."""
    found = np.zeros((len(values), length), np.float32)
    for row, (begin, count) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        found[row, begin : begin + count] = values[row, :count]
    return found


def from_rows(
    values: Float[np.ndarray, "R T"], lengths: Int[np.ndarray, " R"], first: Int[np.ndarray, " R"], most: int
) -> Float[np.ndarray, "R N"]:
    """The inverse of `on_rows`."""
    found = np.zeros((len(values), most), np.float32)
    for row, (begin, count) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        found[row, :count] = values[row, begin : begin + count]
    return found


def text_arrays(
    prompts: Sequence[Sequence[int]], answers: Int[np.ndarray, "R N"], lengths: Int[np.ndarray, " R"], shape: RowShape
) -> dict[str, np.ndarray]:
    """{inputs, segment_ids} [R, T]: prompt and answer as the whole text that a reward model reads. A source ends with
    EOS where the tokenizer has it, which such a text has not before its answer."""
    width = shape.text_length
    tokens, held = np.zeros((len(prompts), width), np.int32), np.zeros(len(prompts), np.int64)
    for row, (ids, answer, count) in enumerate(zip(prompts, answers, lengths.tolist(), strict=True)):
        text = [*(ids[:-1] if shape.source and shape.source_end else ids), *answer[:count].tolist()]
        tokens[row, : len(text)], held[row] = text, len(text)
    return {"inputs": tokens, "segment_ids": (np.arange(width)[None, :] < held[:, None]).astype(np.int32)}
