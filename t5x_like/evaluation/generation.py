"""Answers of any number of prompts that end at texts: in batches of few shapes, in rounds that grow.

A stop is a text, which may begin in one token and end in another, so that the host looks for it after each round;
rows that go on are prefilled again with what they have. Continuous batching is not here.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import jax

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.evaluation.model import EvaluatedModel
from t5x_like.inference import decode
from t5x_like.inference.sampling import Sampling
from t5x_like.inference.score import batch_shards
from t5x_like.inference.weights import for_decoding
from t5x_like.models.model import Model

FIRST_ROUND = 32  # new tokens; each further round adds as many as there are


@dataclasses.dataclass(frozen=True)
class Limits:
    """stops: an answer ends before the first of these texts. max_new_tokens: of each answer."""

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int


def generate(subject: EvaluatedModel, prompts: Sequence[list[int]], limits: Limits, *, batch_tokens: int) -> list[str]:
    """The answer to each prompt, in the order of the input. A prompt is what a decoder continues, or an encoder reads.

    The beginning of a prompt that leaves no room for the answer is dropped.
    """
    kept = room(subject, limits)
    prompts = [prompt[-kept:] for prompt in prompts]
    model, params = for_decoding(subject.model, subject.params)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with jax.set_mesh(subject.mesh) if subject.mesh is not None else contextlib.nullcontext():
        for chosen in _batches(prompts, order, limits.max_new_tokens, batch_tokens):
            batch = _Batch(subject, model, params, [prompts[index] for index in chosen], limits)
            for index, answer in zip(chosen, batch.answers(chosen), strict=True):
                answers[index] = answer
    return answers


def room(subject: EvaluatedModel, limits: Limits) -> int:
    """Tokens of a prompt at most. An encoder keeps all of its length for it."""
    left = subject.max_length if subject.has_encoder else subject.max_length - limits.max_new_tokens
    if left < 1:
        raise UsageError(
            f"{subject.name}: max_gen_toks={limits.max_new_tokens} leaves no room for a context in this model's "
            f"max_length={subject.max_length}; set max_gen_toks in the task's generation_kwargs"
        )
    return left


def _batches(
    prompts: Sequence[list[int]], order: Sequence[int], new: int, batch_tokens: int
) -> Iterator[Sequence[int]]:
    begin = 0
    while begin < len(order):
        length = decode.bucket(len(prompts[order[begin]])) + decode.bucket(new)
        rows = max(1, batch_tokens // length)
        yield order[begin : begin + rows]
        begin += rows


@dataclasses.dataclass(frozen=True)
class _Batch:
    subject: EvaluatedModel
    model: Model
    params: Tree
    prompts: Sequence[list[int]]
    limits: Limits

    def answers(self, indices: Sequence[int]) -> list[str]:
        """indices: of the prompts in the whole input, so that no two batches draw the same."""
        new: list[list[int]] = [[] for _ in self.prompts]
        going, done = list(range(len(self.prompts))), 0
        while going and done < self.limits.max_new_tokens:
            count = min(max(done, FIRST_ROUND), self.limits.max_new_tokens - done)
            seed = zlib.crc32(repr((self.limits.seed, indices[0], done)).encode())
            for row, tokens in zip(going, self._more(going, new, count, seed=seed), strict=True):
                new[row] += tokens
                ended = len(tokens) < count
                if ended or self._stopped(new[row]):
                    new[row].append(-1)
            going = [row for row in going if new[row][-1:] != [-1]]
            done += count
        return [self._text(tokens) for tokens in new]

    def _more(self, rows: Sequence[int], new: Sequence[list[int]], count: int, *, seed: int) -> list[list[int]]:
        subject, filled = self.subject, [*rows, *[rows[0]] * (self._size(len(rows)) - len(rows))]
        sources = [self.prompts[row] for row in filled] if subject.has_encoder else None
        begins = [[subject.start_id] if subject.has_encoder else self.prompts[row] for row in filled]
        return decode.generate(
            self.model,
            self.params,
            [begin + new[row] for begin, row in zip(begins, filled, strict=True)],
            max_new_tokens=count,
            sampling=self.limits.sampling,
            seed=seed,
            stop_ids=subject.stop_ids,
            sources=sources,
        )[: len(rows)]

    def _size(self, rows: int) -> int:
        """Rows of a batch, so that few different numbers are compiled: a power of 2 for each shard of the mesh."""
        shards = batch_shards(self.subject.model, self.subject.mesh)
        return shards << max(-(-rows // shards) - 1, 0).bit_length()

    def _stopped(self, tokens: Sequence[int]) -> bool:
        text = self.subject.vocabulary.decode(tokens)
        return any(stop in text for stop in self.limits.stops)

    def _text(self, tokens: Sequence[int]) -> str:
        text = self.subject.vocabulary.decode(token for token in tokens if token >= 0)
        for stop in self.limits.stops:
            text = text.split(stop)[0]
        return text
