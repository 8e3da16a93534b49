"""Tokens that were added to a SentencePiece model, which the model itself does not know.

Special ones never arise from a text. The others are found in it first, the longest at each place, and what is between
them is encoded by the model; behind one no space is put before the text, unless the folder says that it is `legacy`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Encode = Callable[[Sequence[str]], list[list[int]]]


class AddedToken(NamedTuple):
    id: int
    content: str
    special: bool


class Division:
    """Divides texts at added tokens that are no special ones."""

    def __init__(self, tokens: Sequence[AddedToken]):
        self._ids = {token.content: token.id for token in tokens if not token.special}
        self.contents = {token: content for content, token in self._ids.items()}
        longest = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest)})") if longest else None

    def divide(self, text: str) -> list[str | int]:
        """Texts and the ids of the tokens between them; texts may be empty.

        >>> Division([AddedToken(9, "<a>", False)]).divide("b<a>c")
        ['b', 9, 'c']
        """
        if self._pattern is None:
            return [text]
        parts = self._pattern.split(text)
        return [self._ids[part] if index % 2 else part for index, part in enumerate(parts)]

    def encode(self, text: str, first: Encode, later: Encode) -> Iterator[int]:
        """Ids of a text: `first` encodes what it begins with, `later` what stands behind an added token."""
        for index, part in enumerate(self.divide(text)):
            if isinstance(part, int):
                yield part
            elif part:
                yield from (later if index else first)([part])[0]

    @property
    def divides(self) -> bool:
        return self._pattern is not None
