"""Where a text may be cut in two without other ids: where no word of the pre-tokenizer and no token spans the place.

Two kinds of places: behind a word, before its single space; and between two lines. Which of them a tokenizer never
looks over is read off its file. Encoding in parts is data/tokenizers/long_texts.py.
"""

import re
from collections.abc import Iterable
from typing import Any

from t5x_like.data.tokenizers import word_cache

ANYWHERE = "(?s)(?=.)"  # of bytes
_BEHIND_WORD, BETWEEN_LINES = r"(?<=[^\W_])(?= [^\W_])", r"(?<=\S\n)(?=[^\W_])"
_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Prepend", "Precompiled"),
    *("Nmt", "ByteLevel"),
}
_DIVIDE_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_DIVIDE_FURTHER = {"Punctuation", "Digits", "UnicodeScripts", "Metaspace"}
_PATTERNS = (word_cache.GPT2, word_cache.LLAMA3, word_cache.QWEN2)


def between_tokens(surfaces: Iterable[bytes | None]) -> str:
    """A pattern of the places that no token spans, by what tokens stand for; "" for none."""
    # A byte of a character that a token does not hold whole may be one of a letter.
    texts = [surface.decode(errors="surrogateescape") for surface in surfaces if surface]
    spanned = {_BEHIND_WORD: r"(?:[^\W_]|[\udc80-\udcff]) ", BETWEEN_LINES: r"\n(?:[^\W_]|[\udc80-\udcff])"}
    places = {place: re.compile(spans) for place, spans in spanned.items()}
    return "|".join(place for place, spans in places.items() if not any(map(spans.search, texts)))


def between_words(layout: dict[str, Any], surfaces: Iterable[bytes | None]) -> str:
    """The same of a tokenizer.json: "" too where its normalizer or pre-tokenizer may look over the places."""
    if not all(_keeps_places(step) for step in _steps(layout.get("normalizer"), "normalizers")):
        return ""
    added = [token for token in layout.get("added_tokens", []) if not token["special"]]
    if any(token.get("rstrip") or re.search(r"\w |\n\w", token["content"]) for token in added):
        return ""
    if any(token.get("lstrip") and re.match(r"\w", token["content"]) for token in added):
        return ""
    divided = False
    for step in _steps(layout.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] in _DIVIDE_AT_SPACES or step["type"] == "Split" and _is_known(step):
            divided = True
        elif step["type"] == "ByteLevel":
            divided |= step.get("use_regex", True)
        elif not divided and step["type"] not in _DIVIDE_FURTHER and not _is_of_one_character(step):
            return ""
    return f"{_BEHIND_WORD}|{BETWEEN_LINES}" if divided else between_tokens(surfaces)


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [inner for entry in part[name] for inner in _steps(entry, name)] if name in part else [part]


def _keeps_places(step: dict[str, Any]) -> bool:
    """Whether a normalizer changes nothing across the places."""
    if step["type"] == "Replace":
        pattern = step.get("pattern", {})
        return len(pattern.get("String", "")) == 1 or pattern.get("Regex") in (" {2,}", r"\s+")
    return step["type"] in _NORMALIZERS


def rounds(layout: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has a unigram whose sum over a long text may be rounded: one that no pre-tokenizer
    divides at spaces, with scores that float64 does not add up exactly (those of float32 it does)."""
    model = layout.get("model") or {}
    if model.get("type") != "Unigram":
        return False
    steps = _steps(layout.get("pre_tokenizer"), "pretokenizers")
    if any(
        step["type"] in _DIVIDE_AT_SPACES or step["type"] == "Metaspace" and step.get("split", True) for step in steps
    ):
        return False
    return any(score * 2**24 != int(score * 2**24) for _, score in model["vocab"])  # exact below 2^29 in sum


def _is_of_one_character(split: dict[str, Any]) -> bool:
    return split["type"] == "Split" and len(split.get("pattern", {}).get("String", "")) == 1


def _is_known(split: dict[str, Any]) -> bool:
    pattern = split.get("pattern", {})
    return pattern.get("Regex") in _PATTERNS and split.get("behavior") == "Isolated" and not split.get("invert")
