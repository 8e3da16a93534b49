"""Answers as rows of a batch: where the tokens of an answer stand in the row that is trained on.

A decoder's row is the prompt followed by the answer; of a model with an encoder the prompt is the source, and the
decoder's row is the answer alone behind its start token. Only the answer carries loss, its end token included.

Several answers to a prompt may share it (`SeveralARow`).

Names: R rows, T length of a row, S of a source, N the most tokens of an answer, J answers of a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from t5x_like.inference.decode import encoder_batch


@dataclasses.dataclass(frozen=True)
class RowShape:
    """length: tokens of a row (T); source: of an encoder's row (S), 0 without one; start: a decoder's start token.

    judge: the start token of a reward model with an encoder, None where there is none; end: EOS, with which
    sources end; None where the tokenizer has none.
    """

    length: int
    source: int
    start: int
    judge: int | None = None
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class OneARow:
    """Each answer stands behind its prompt in a row of its own. prompts: one an answer; most: N."""

    prompts: Sequence[Sequence[int]]
    lengths: Int[np.ndarray, " R"]
    shape: RowShape
    most: int

    @property
    def _first(self) -> Int[np.ndarray, " R"]:
        return first_targets(self.prompts, self.shape)

    def arrays(self, answers: Int[np.ndarray, "R N"]) -> dict[str, np.ndarray]:
        return token_arrays(self.prompts, answers, self.lengths, self.shape)

    def placed(self, values: Float[np.ndarray, "R N"]) -> Float[np.ndarray, "R T"]:
        """A number for each token of the answers where the targets of a batch stand."""
        return on_rows(values, self.lengths, self._first, self.shape.length)

    def taken(self, values: Float[np.ndarray, "R T"]) -> Float[np.ndarray, "R N"]:
        """The inverse of `placed`."""
        return from_rows(values, self.lengths, self._first, self.most)

    def one_each(self, values: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
        """A number for each answer where a batch holds it."""
        return values


@dataclasses.dataclass(frozen=True)
class SeveralARow:
    """J answers of a prompt share it: a row is the prompt and, behind it, the answers. prompts: one an answer, those of
    a row equal and one behind the other; room: tokens that a prompt may have; most: N. A answers in all."""

    prompts: Sequence[Sequence[int]]
    lengths: Int[np.ndarray, " A"]
    count: int
    room: int
    most: int

    @property
    def _inside(self) -> Bool[np.ndarray, "A N"]:
        return np.arange(self.most) < self.lengths[:, None]

    def arrays(self, answers: Int[np.ndarray, "A N"]) -> dict[str, np.ndarray]:
        """{inputs [R, room], branches [R, J, N - 1]} as models/model.py says, {segment_ids, positions} of both, and
        {targets, loss_weights} [R, J, N]. Prompts stand at the end of their room; the last token of an answer is read
        by nothing, and the first one is the target of the prompt's last."""
        prompts, answers = self.prompts[:: self.count], self.one_each(answers)
        rows = len(prompts)
        inputs, held = np.zeros((rows, self.room), np.int32), np.array([len(ids) for ids in prompts])
        for row, ids in enumerate(prompts):
            inputs[row, self.room - len(ids) :] = ids
        inside = self.one_each(self._inside)
        read = inside[:, :, 1:]
        index = np.arange(self.room) - (self.room - held)[:, None]
        behind = np.broadcast_to(held[:, None, None] + np.arange(self.most - 1), read.shape)
        return {
            "inputs": inputs,
            "branches": np.where(read, answers[:, :, :-1], 0).astype(np.int32),
            "segment_ids": np.concatenate([index >= 0, read.reshape(rows, -1)], axis=1).astype(np.int32),
            "positions": np.concatenate([np.maximum(index, 0), behind.reshape(rows, -1)], axis=1).astype(np.int32),
            "targets": np.where(inside, answers, 0).astype(np.int32),
            "loss_weights": inside.astype(np.float32),
        }

    def placed(self, values: Float[np.ndarray, "A N"]) -> Float[np.ndarray, "R J N"]:
        return self.one_each(np.where(self._inside, values, 0.0).astype(np.float32))

    def taken(self, values: Float[np.ndarray, "R JN"]) -> Float[np.ndarray, "A N"]:
        return np.where(self._inside, values.reshape(-1, self.most), 0.0).astype(np.float32)

    def one_each(self, values: np.ndarray) -> np.ndarray:
        """[A, ...] -> [R, J, ...]."""
        return values.reshape(-1, self.count, *values.shape[1:])


def token_arrays(
    prompts: Sequence[Sequence[int]], answers: Int[np.ndarray, "R N"], lengths: Int[np.ndarray, " R"], shape: RowShape
) -> dict[str, np.ndarray]:
    """{inputs, targets, segment_ids, loss_weights} [R, T], and an encoder's arrays [R, S]."""
    if shape.source:
        before = [[shape.start] for _ in prompts]
        arrays = encoder_batch(*_padded(prompts, shape.source))
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


def text_widths(new_tokens: int, length: int, source: int, *, apart: bool, ended: bool) -> dict[str, int]:
    """The lengths of the rows of `text_arrays`: {"inputs": T} and, where the reward model has an encoder, of its rows.

    new_tokens, length, source: N, T and S of the policy's rows; apart: whether the reward model has an encoder;
    ended: whether sources end with EOS.
    """
    room = source - ended if source else length + 1 - new_tokens  # of a prompt without EOS
    return {"inputs": new_tokens + 1, "encoder_inputs": room + ended} if apart else {"inputs": room + new_tokens}


def text_arrays(
    prompts: Sequence[Sequence[int]], answers: Int[np.ndarray, "R N"], lengths: Int[np.ndarray, " R"], shape: RowShape
) -> dict[str, np.ndarray]:
    """{inputs, segment_ids} [R, T]: prompt and answer as the whole text that a reward model reads. With an encoder
    (`shape.judge`) the prompt is its source and the text is the start token and the answer. A source ends with EOS
    where the tokenizer has it, which a text has not before its answer."""
    ended = shape.end is not None
    widths = text_widths(answers.shape[1], shape.length, shape.source, apart=shape.judge is not None, ended=ended)
    bare = [ids[:-1] if shape.source and ended else ids for ids in prompts]
    texts = [
        [*(ids if shape.judge is None else [shape.judge]), *answer[:count].tolist()]
        for ids, answer, count in zip(bare, answers, lengths.tolist(), strict=True)
    ]
    tokens, held = _padded(texts, widths["inputs"])
    arrays = {"inputs": tokens, "segment_ids": (np.arange(widths["inputs"]) < held[:, None]).astype(np.int32)}
    if shape.judge is None:
        return arrays
    end = [] if shape.end is None else [shape.end]
    return arrays | encoder_batch(*_padded([[*ids, *end] for ids in bare], widths["encoder_inputs"]))


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [R, width], how many each row has)."""
    tokens, held = np.zeros((len(rows), width), np.int32), np.array([len(row) for row in rows])
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, held
