"""Conversations to tokens: the records of a source through a chat template, and which of their tokens are trained.

A token is trained if a byte of it stands in what the assistant wrote (a token without bytes: if it stands there), which
is the rule of transformers' assistant masks. For an encoder-decoder every turn of the assistant is an example: what
comes before is its source, the turn its target, and it ends with the end of the text.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from t5x_like.core.errors import UserError
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
    also a target that is worse. joined: targets are encoded as they stand behind the source."""

    whole: Rendered | None
    source: Parts
    target: Parts
    rejected: Parts | None = None
    joined: bool = False

    @property
    def size(self) -> int:
        parts = [*self.source, *self.target, *(self.rejected or ())]
        return (len(self.whole.text) if self.whole else 0) + sum(len(p) for p in parts if isinstance(p, str))


class Writer:
    """Writes the conversations of a source. `job`: {"template": Jinja, "name", "train_on", "apart"}, as `job` gives."""

    def __init__(self, job: dict[str, Any], vocabulary: Vocabulary):
        where = f"{TEMPLATE}={job['name']!r}"
        self._chat, self._where = Chat(job["template"], vocabulary, where=where, now=chat.PREPARED), where
        self._last, self._apart = job["train_on"] == "last", job["apart"]
        self._joined = job.get("joined", False)
        self._calls = job["name"] == "tokenizer"

    def written(self, messages: Sequence[Message]) -> Iterator[Written]:
        """UserError for a conversation that the template does not take, TemplateRefused for a template."""
        self._check_calls(messages)
        if not self._apart:
            yield Written(self._chat.whole(messages, last=self._last), [], [])
            return
        for source, target in [*self._chat.turns(messages, last=self._last)]:
            yield Written(None, source, target)

    def pair(self, chosen: Sequence[Message], rejected: Sequence[Message]) -> Written:
        """Two conversations that differ in their last turn, the assistant's."""
        self._check_calls([*chosen, *rejected])
        (source, better), (_, worse) = (next(iter(self._chat.turns(each, last=True))) for each in (chosen, rejected))
        return Written(None, source, better, worse, self._joined)

    def _check_calls(self, messages: Sequence[Message]) -> None:
        if not self._calls and any(message.get("tool_calls") for message in messages):
            raise UserError(
                f"a message calls a tool (tool_calls), which {self._where} does not write; use {TEMPLATE}='tokenizer' "
                "with a template that does, or leave such conversations out"
            )


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
        **({"joined": True} if config.joined else {}),
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
    pairs = [_encode_pair(each, vocabulary) for each in written]
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


def _encode_pair(written: Written, vocabulary: Vocabulary) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, bytes of each) of the prompt and of both answers.

    Joined, the tokens of prompt and answer are those of the whole text, as in a conversation that is trained on (with
    `Written.whole`): a token of which a byte is the answer's belongs to it, and what both texts do not share, too.
    """
    answers = written.target, written.rejected or []
    if not written.joined:
        return [vocabulary.encode_parts(parts)[:2] for parts in (written.source, *answers)]
    both = [_behind(written.source, answer, vocabulary) for answer in answers]
    (better, _, first), (worse, _, second) = both
    same = min(first, second)
    same = next((i for i in range(same) if better[i] != worse[i]), same)
    prompt = tuple(column[:same] for column in both[0][:2])
    return [(prompt[0], prompt[1]), *((ids[same:], counts[same:]) for ids, counts, _ in both)]


def _behind(source: Parts, answer: Parts, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, bytes of each, tokens before the answer) of the whole text."""
    names = {token: name for name, token in vocabulary.specials.items()}
    border, end = (
        sum(len((names[part] if isinstance(part, int) else part).encode()) for part in parts)
        for parts in (source, [*source, *answer])
    )
    whole = [*source, *answer]
    if source and answer and isinstance(source[-1], str) and isinstance(answer[0], str):
        whole = [*source[:-1], source[-1] + answer[0], *answer[1:]]
    ids, counts, begins = vocabulary.encode_parts(whole)
    ends = np.maximum(np.append(begins[1:], end), begins + 1)
    return ids, counts, int((ends <= border).cumprod().sum())


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
