"""Answers as they stand behind their prompts: without the space that SentencePiece puts before the begin of a text.

A prompt keeps the tokens that it has by itself, which are those that a served model is given. The answer is what the
tokens of both together have behind them; where a token spans the border, the answer is encoded behind a sign that it
does not join. A tokenizer that puts no space before a text encodes the answer by itself.
"""

from collections.abc import Sequence

import numpy as np

from t5x_like.data.tokenizers.vocabularies import Vocabulary

_SIGNS = ("\n", ".", ":", "a", "0")


def encode(
    vocabulary: Vocabulary, prompts: Sequence[str], answers: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, bytes of the answer that each stands for) of each answer; no special tokens.

    An answer without a prompt begins its text.
    """
    if not vocabulary.adds_space:
        return _apart(vocabulary, answers)
    own, whole = _apart(vocabulary, prompts), _apart(vocabulary, _joined(prompts, answers))
    found = []
    for prompt, answer, (before, _), both in zip(prompts, answers, own, whole, strict=True):
        rest = both if not prompt else _rest(before, both)
        found.append(_alone(vocabulary, answer) if rest is None else _counted(*rest, answer))
    return found


def _joined(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


def _apart(vocabulary: Vocabulary, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    ids, lengths = vocabulary.encode_batch(texts)
    counts, edges = vocabulary.count_bytes(texts, ids, lengths), np.cumsum(lengths)[:-1]
    return [*zip(np.split(ids, edges), np.split(counts, edges), strict=True)]


def _rest(before: np.ndarray, both: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """What stands behind the tokens `before`, None where they are not how the whole begins."""
    ids, counts = both
    if not len(before) or not np.array_equal(ids[: len(before)], before):
        return None
    return ids[len(before) :], counts[len(before) :]


def _alone(vocabulary: Vocabulary, answer: str) -> tuple[np.ndarray, np.ndarray]:
    for sign in _SIGNS:
        (before, _), both = _apart(vocabulary, [sign, sign + answer])
        rest = _rest(before, both)
        if rest is not None:
            return _counted(*rest, answer)
    return _apart(vocabulary, [answer])[0]


def _counted(ids: np.ndarray, counts: np.ndarray, answer: str) -> tuple[np.ndarray, np.ndarray]:
    """The counts add up to the answer: white space that a tokenizer gives to another token is that of the first."""
    if len(counts):
        counts = counts.copy()
        counts[0] += len(answer.encode()) - counts.sum()
    return ids, counts
