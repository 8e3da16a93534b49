"""Very long texts to ids part by part, with the ids of the whole text.

A text is cut at places that neither words nor tokens span (data/tokenizers/cuts.py). A part begins one character
before its cut, so that what a tokenizer puts before a text (SentencePiece's space) falls to that character; its tokens
are left out again. Each cut is tried on the text around it before it is used. A text without such a place stays whole.

A unigram model of SentencePiece adds up scores in float32 along the whole text. What the sum has come to decides how a
near tie is rounded, so no place is sure, and texts of up to `WHOLE` characters stay whole.
"""

import re
from collections.abc import Iterator

import numpy as np

from t5x_like.data.tokenizers.vocabularies import Vocabulary

WHOLE = 16 << 20
_AROUND = 24  # characters on both sides of a cut, on which it is tried
_TRIES = 64


def encode(
    vocabulary: Vocabulary, text: str, *, size: int, whole: int = WHOLE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, bytes of each) of parts of at least `size` characters, one after the other; together those of the text.

    `whole`: the same for a vocabulary that rounds, whose texts of up to so many characters have the exact ids.
    """
    size = max(size, whole) if vocabulary.rounds else size
    begin = 0
    while begin < len(text):
        end = _cut(vocabulary, text, begin + size)
        if begin == 0:
            ids, lengths = vocabulary.encode_batch([text[:end]])
            yield ids, vocabulary.count_bytes([text[:end]], ids, lengths)
        else:
            yield _continued(vocabulary, text[begin - 1 : end])
        begin = end


def _continued(vocabulary: Vocabulary, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a text without its first character, which stands before it."""
    ids, lengths = vocabulary.encode_batch([part])
    counts = vocabulary.count_bytes([part], ids, lengths)
    before = len(vocabulary.encode(part[0]))
    missing = len(part[0].encode()) - int(counts[:before].sum())
    ids, counts = ids[before:], counts[before:].copy()
    if missing and len(counts):  # the tokenizer drops that character, or gives it to the token behind it
        counts[0] -= missing
    return ids, counts


def _cut(vocabulary: Vocabulary, text: str, least: int) -> int:
    """The first place from `least` on where the text may be cut; its end if there is none."""
    if least >= len(text) or not vocabulary.cuts:
        return len(text)
    found = re.compile(vocabulary.cuts).finditer(text, least)
    for _, place in zip(range(_TRIES), found, strict=False):
        if _holds(vocabulary, text, place.start()):
            return place.start()
    return len(text)


def _holds(vocabulary: Vocabulary, text: str, at: int) -> bool:
    """Whether a cut changes nothing in the text around it."""
    before, behind = text[max(at - _AROUND, 0) : at], text[at - 1 : at + _AROUND]
    last, right = vocabulary.encode(behind[0]), vocabulary.encode(behind)
    whole = vocabulary.encode(before + behind[1:])
    return right[: len(last)] == last and vocabulary.encode(before) + right[len(last) :] == whole
