"""A faster way to the same ids for tokenizers that cut text into words by a known pattern: each word is encoded once.

Two to three times as fast as the library alone [English text, 2 cores]: Python's `re` finds the words, a dict knows
their ids, and the library encodes the words that are new. Used only where that is provably the same: no normalizer,
byte-level pre-tokenizer, one of the patterns below, and text whose characters Python and the library class alike.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

# Llama 3's pattern: a word with what stands before it, up to 3 digits, signs with the line ends behind them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_END = 0x3000  # characters from here on (CJK, emoji) are left to the library
_WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f"  # White_Space below; Python's \s has more
_MOST_CHARACTERS = 32 << 20  # of remembered words


class WordCache:
    """Encodes texts by their words, or says that it cannot."""

    def __init__(self, pattern: str, encode_words: Callable[[list[str]], list[list[int]]]):
        self._words, self._outside = _compiled(pattern)
        self._encode_words = encode_words
        self._known: dict[str, list[int]] = {}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[list[int] | None]:
        """The ids of each text; None for one with a character whose class is not certain."""
        outside = self._outside.search
        if outside("".join(texts)) is None:
            return [*self._encode(texts)]
        certain = [outside(text) is None for text in texts]
        found = iter(self._encode([text for text, sure in zip(texts, certain, strict=True) if sure]))
        return [next(found) if sure else None for sure in certain]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        known, words = self._known, [*map(self._words.findall, texts)]
        new = sorted(set().union(*words).difference(known))
        if new:
            known.update(zip(new, self._encode_words(new), strict=True))
            self._characters += sum(map(len, new))
        if self._characters > _MOST_CHARACTERS:  # another thread may still read the old one
            self._known, self._characters = {}, 0
        of_word, flat = known.__getitem__, itertools.chain.from_iterable
        return [[*flat(map(of_word, line))] for line in words]


def pattern_of(layout: dict[str, Any]) -> str | None:
    """The pattern that a tokenizer.json cuts words by, if words alone decide the ids; else None."""
    if layout.get("normalizer") is not None or (layout.get("model") or {}).get("dropout"):
        return None
    if not all(token["special"] for token in layout.get("added_tokens", [])):
        return None
    before = layout.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    if [step.get("type") for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        found: str | None = GPT2
    elif [step.get("type") for step in steps] == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        found = (steps[0].get("pattern") or {}).get("Regex") if isolated else None
    else:
        return None
    return found if found in (GPT2, LLAMA3, QWEN2) and not steps[-1].get("add_prefix_space") else None


@functools.cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(words, characters outside of what is certain). Python has no \\p: classes are spelled out below _END."""
    letters, numbers = _class("L"), _class("N")
    for old, new in (
        (r"[^\s\p{L}\p{N}]", f"[^{_WHITE_SPACE}{letters}{numbers}]"),
        (r"[^\r\n\p{L}\p{N}]", rf"[^\r\n{letters}{numbers}]"),
        (r"\p{L}", f"[{letters}]"),
        (r"\p{N}", f"[{numbers}]"),
        (r"\S", f"[^{_WHITE_SPACE}]"),
        (r"\s", f"[{_WHITE_SPACE}]"),
    ):
        pattern = pattern.replace(old, new)
    # A character that is unassigned here may be a letter in the library's newer Unicode.
    return re.compile(pattern), re.compile(f"[{_class('Cn')}{chr(_END)}-\U0010ffff]")


@functools.cache
def _class(category: str) -> str:
    """The ranges of a regex class: the characters below _END whose general category begins so."""
    inside = [unicodedata.category(chr(point)).startswith(category) for point in range(_END)]
    edges = [point for point, (a, b) in enumerate(itertools.pairwise([False, *inside, False])) if a != b]
    ranges = zip(edges[::2], edges[1::2], strict=True)
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(end - 1))}" for first, end in ranges)
