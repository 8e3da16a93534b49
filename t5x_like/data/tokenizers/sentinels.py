"""Text with sentinels, <extra_id_0> and so on, to ids and back: how people ask a model of span corruption to fill gaps.

A vocabulary by itself gives sentinels no text, so that they cannot arise from a document.
"""

import re
from collections.abc import Iterable

from t5x_like.data.tokenizers.vocabularies import Vocabulary

_SENTINEL = re.compile(r"\s*<extra_id_(\d+)>")


def encode(vocabulary: Vocabulary, text: str) -> list[int]:
    """Ids of a text in which <extra_id_N> is one token, if the vocabulary has it. White space before it is dropped: in
    training it belongs to the words that the sentinel stands for."""
    ids: list[int] = []
    begin = 0
    for found in _SENTINEL.finditer(text):
        number = int(found[1])
        if number < vocabulary.extra_ids:
            before = text[begin : found.start()]
            ids += [*(vocabulary.encode(before) if before else []), vocabulary.size - 1 - number]
            begin = found.end()
    rest = text[begin:]
    return ids + vocabulary.encode(rest) if rest else ids


def decode(vocabulary: Vocabulary, ids: Iterable[int]) -> str:
    """The text of ids, in which a sentinel is written <extra_id_N>."""
    parts: list[str] = []
    waiting: list[int] = []
    for token in ids:
        number = vocabulary.size - 1 - token
        if number >= vocabulary.extra_ids:
            waiting.append(token)
            continue
        parts += [vocabulary.decode(waiting), f"<extra_id_{number}>"]
        waiting = []
    return "".join([*parts, vocabulary.decode(waiting)])
