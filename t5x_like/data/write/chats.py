"""Conversations to tokens: the records of a source through a chat template, and which of their tokens are trained.

A token is trained if a byte of it stands in what the assistant wrote (a token without bytes: if it stands there), which
is the rule of transformers' assistant masks. For an encoder-decoder every turn of the assistant is an example: what
comes before is its source, the turn its target, and it ends with the end of the text.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from t5x_like.data import token_shards
from t5x_like.data.config import DataConfig
from t5x_like.data.templates import chat
from t5x_like.data.templates.chat import Chat, Rendered
from t5x_like.data.templates.messages import Message
from t5x_like.data.tokenizers.vocabularies import Vocabulary

TEMPLATE = "config.data.chat.template"
Parts = list[str | int]


@dataclasses.dataclass(frozen=True)
class Written:
    """A conversation as it is tokenized: the whole with what is trained of it, or a source and its target, in a pair
    also a target that is worse."""

    whole: Rendered | None
    source: Parts
    target: Parts
    rejected: Parts | None = None

    @property
    def size(self) -> int:
        parts = [*self.source, *self.target, *(self.rejected or ())]
        return (len(self.whole.text) if self.whole else 0) + sum(len(p) for p in parts if isinstance(p, str))


class Writer:
    """Writes the conversations of a source. `job`: {"template": Jinja, "name", "train_on", "apart"}, as `job` gives."""

    def __init__(self, job: dict[str, Any], vocabulary: Vocabulary):
        where = f"{TEMPLATE}={job['name']!r}"
        self._chat = Chat(job["template"], vocabulary, where=where, now=chat.PREPARED)
        self._last, self._apart = job["train_on"] == "last", job["apart"]

    def written(self, messages: Sequence[Message]) -> Iterator[Written]:
        """UserError for a conversation that the template does not take, TemplateRefused for a template."""
        if not self._apart:
            yield Written(self._chat.whole(messages, last=self._last), [], [])
            return
        for source, target in [*self._chat.turns(messages, last=self._last)]:
            yield Written(None, source, target)

    def pair(self, chosen: Sequence[Message], rejected: Sequence[Message]) -> Written:
        """Two conversations that differ in their last turn, the assistant's."""
        (source, better), (_, worse) = (next(iter(self._chat.turns(each, last=True))) for each in (chosen, rejected))
        return Written(None, source, better, worse)


def job(config: DataConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """What a worker is told of a config's chat template; {} without one."""
    if not config.chats:
        return {}
    given = config.chat
    return {
        "template": chat.source(given.template, vocabulary, system=given.system, where=TEMPLATE),
        "name": given.template,
        "train_on": given.train_on,
        "apart": config.answers_apart,
    }


def encode(
    written: Sequence[Written], places: Sequence[tuple[int, int]], vocabulary: Vocabulary
) -> token_shards.Encoded:
    """The tokens of conversations, which have what the template writes and no more."""
    if written[0].rejected is not None:
        return _encode_pairs(written, places, vocabulary)
    encoded = [_encode(each, vocabulary) for each in written]
    kept = [len(ids) > 0 for ids, _, _ in encoded]
    where = np.array(places, np.int64).reshape(-1, 2)[kept]
    encoded = [each for each in encoded if len(each[0])]
    empty = np.zeros(0, np.int64)
    ids, counts, trained = (np.concatenate([empty, *column]) for column in ([*zip(*encoded, strict=True)] or [[]] * 3))
    inputs = [int(marks.argmax()) if marks.any() else len(marks) for _, _, marks in encoded]
    columns = {} if any(each.whole is None for each in written) else {"trained": trained}
    return token_shards.Encoded(
        ids.astype(np.int32),
        counts,
        np.array([len(ids) for ids, _, _ in encoded], np.int64),
        np.array(inputs, np.int64),
        where[:, 0],
        where[:, 1],
        len(kept) - sum(kept),
        columns,
    )


def _encode_pairs(
    written: Sequence[Written], places: Sequence[tuple[int, int]], vocabulary: Vocabulary
) -> token_shards.Encoded:
    """The prompt, both answers behind it; each ends with the end of the text, if its turn does not."""
    pairs = [
        [vocabulary.encode_parts(parts)[:2] for parts in (each.source, each.target, each.rejected or [])]
        for each in written
    ]
    lengths = np.array([[len(ids) for ids, _ in pair] for pair in pairs], np.int64)
    where = np.array(places, np.int64).reshape(-1, 2)
    return token_shards.Encoded(
        np.concatenate([ids for pair in pairs for ids, _ in pair]).astype(np.int32),
        np.concatenate([counts for pair in pairs for _, counts in pair]),
        lengths.sum(axis=1),
        lengths[:, 0],
        where[:, 0],
        where[:, 1],
        0,
        {"rejected": lengths[:, 0] + lengths[:, 1]},
    )


def _encode(written: Written, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, bytes of each, 1 where it is trained)"""
    if written.whole is not None:
        parts = written.whole.parts()
        ids, counts, begins = vocabulary.encode_parts(parts)
        return ids, counts, _trained(written.whole, begins)
    source, target = (vocabulary.encode_parts(parts) for parts in (written.source, written.target))
    ids, counts, _ = (np.concatenate(pair) for pair in zip(source, target, strict=True))
    if vocabulary.eos_id is not None and (not len(ids) or ids[-1] != vocabulary.eos_id):
        ids, counts = np.append(ids, vocabulary.eos_id), np.append(counts, 0)
    return ids, counts, (np.arange(len(ids)) >= len(source[0])).astype(np.int64)


def _trained(rendered: Rendered, begins: np.ndarray) -> np.ndarray:
    """1 for the tokens of which a byte lies in what the assistant wrote."""
    ends = np.append(begins[1:], len(rendered.text.encode()))
    marks = np.zeros(len(begins), bool)
    for span in rendered.trained:
        first, last = (len(rendered.text[:edge].encode()) for edge in span)
        marks |= (begins < last) & (np.maximum(ends, begins + 1) > first)
    return marks.astype(np.int64)
