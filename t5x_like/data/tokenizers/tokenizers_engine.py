"""`tokenizer.json`, the format of the `tokenizers` library, as a `TokenizerFile`."""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import cuts, spelled_tokens
from t5x_like.data.tokenizers.tokenizer_files import TokenizerFile, named_sentinels, piece_bytes
from t5x_like.data.tokenizers.word_cache import WordCache, pattern_of

_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[CLS]")


class _Tokenizers:
    def __init__(self, tokenizer: Any, encoder: Any, layout: dict[str, Any], specials: Mapping[str, int]):
        style = _style(layout)
        pattern = pattern_of(layout)
        self._tokenizer, self._encoder, self._exact = tokenizer, encoder, style != "opaque"
        self._layout, self._names = layout, {token: name for name, token in specials.items()}
        self._words = None if pattern is None else WordCache(pattern, self._encode)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is None:
            return self._encode(list(texts))
        found = self._words.encode(texts)
        others = iter(self._encode([text for text, ids in zip(texts, found, strict=True) if ids is None]))
        return [next(others) if ids is None else ids for ids in found]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def count_bytes(self, text: str) -> list[int]:
        offsets = self._encoder.encode(text, add_special_tokens=False).offsets
        return _counts_from_offsets(text, offsets)

    def decode(self, ids: list[int]) -> str | None:
        return None if self._exact else self._tokenizer.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def _finding(self) -> Any:
        """The tokenizer as it comes, which finds special tokens in a text."""
        return spelled_tokens.finder(self._layout)

    def encode_parts(self, parts: Sequence[str | int]) -> list[tuple[list[int], list[int]]]:
        """By the library on the whole text, which knows what white space a special token takes with it; part by part
        where a text spells one out."""
        texts = [self._names[part] if isinstance(part, int) else part for part in parts]
        whole = self._finding.encode("".join(texts), add_special_tokens=False)
        if [token for token in whole.ids if token in self._names] == [p for p in parts if isinstance(p, int)]:
            counts = _counts_from_offsets("".join(texts), whole.offsets)
            return [*_divided(parts, whole.ids, counts, set(self._names))]
        first = next((index for index, part in enumerate(parts) if part != ""), 0)
        return [
            ([], []) if isinstance(part, int) else self._encode_part(part, later=index > first)
            for index, part in enumerate(parts)
        ]

    def _encode_part(self, text: str, *, later: bool) -> tuple[list[int], list[int]]:
        """Behind something no space is put before a text that begins with none: it is encoded behind a line end, whose
        tokens are left out."""
        line = self._encode(["\n"])[0] if later else []
        ids = self._encode([f"\n{text}" if later else text])[0]
        if ids[: len(line)] != line:
            ids, line = self._encode([text])[0], []
        counts = self.count_bytes(f"\n{text}" if line else text)[len(line) :]
        if counts:
            counts[0] += len(text.encode()) - sum(counts)
        return ids[len(line) :], counts


def _divided(
    parts: Sequence[str | int], ids: Sequence[int], counts: Sequence[int], specials: set[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """The ids of a whole text, and their counts, given to its parts: special tokens stand between them."""
    at = 0
    for part in parts:
        end = at
        while end < len(ids) and ids[end] not in specials:
            end += 1
        if isinstance(part, int):
            yield [], []
            at += 1
        else:
            yield [*ids[at:end]], [*counts[at:end]]
            at = end


def _counts_from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes per token from character spans; gaps go to the token behind them, a shared span is divided evenly."""
    if not offsets:
        return []
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    position = np.concatenate([[0], np.cumsum(widths)])
    spans = np.array(offsets, np.int64)
    ends = np.maximum.accumulate(position[spans[:, 1]])
    ends[-1] = position[-1]
    counts = np.diff(ends, prepend=0)
    first = np.concatenate([[True], np.any(spans[1:] != spans[:-1], axis=1)])
    group = np.cumsum(first) - 1
    members = np.bincount(group)
    totals = np.bincount(group, weights=counts).astype(np.int64)
    rank = np.arange(len(group)) - np.flatnonzero(first)[group]
    return (totals[group] // members[group] + (rank < totals[group] % members[group])).tolist()


def read(content: bytes, path: pathlib.Path, names: tuple[str | None, str | None]) -> TokenizerFile:
    """From the text of a tokenizer.json; `names` of BOS and EOS, None for the usual ones that it has."""
    import tokenizers

    try:
        layout = json.loads(content)
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0]})") from None
    style = _style(layout)
    added = {token["id"]: token for token in layout.get("added_tokens", [])}
    pieces = {token: piece for piece, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    unknown = (layout.get("model") or {}).get("unk_token")
    surfaces: list[bytes | None] = [b""] * (max(pieces, default=-1) + 1)
    for token, piece in pieces.items():
        surfaces[token] = _token_surface(piece, added.get(token), style, unknown)
    ids = {piece: token for token, piece in pieces.items()}
    bos, eos = (named_token(ids, name, path) for name in names)
    specials = {token["content"]: token["id"] for token in added.values() if token["special"]}
    specials.pop(unknown, None)
    bos = next((specials[n] for n in _BOS_NAMES if n in specials), None) if names == (None, None) else bos
    eos = next((specials[n] for n in _EOS_NAMES if n in specials), None) if eos is None else eos
    bos = None if bos == eos else bos  # GPT-2 names one token twice: documents are then separated by one, not two
    encoder = spelled_tokens.encoder(layout, tokenizer)
    engine = _Tokenizers(tokenizer, encoder, layout, specials)
    places = cuts.between_words(layout, surfaces)
    named = named_sentinels(lambda token: pieces.get(token, ""), len(surfaces))
    return TokenizerFile(
        "tokenizers",
        "tokenizer.json",
        content,
        engine,
        tuple(surfaces),
        bos,
        eos,
        0,
        places,
        named,
        rounds=cuts.rounds(layout),
        found=tuple(token["content"] for token in added.values() if not token["special"]),
        hides_sentinels=not named and "<extra_id_0>" in ids,
        specials=tuple(specials.items()),
    )


def named_token(ids: dict[str, int], name: str | None, path: pathlib.Path) -> int | None:
    if name is not None and name not in ids:
        raise UserError(f"{path}: tokenizer_config.json beside it names the token {name!r}, which it lacks")
    return None if name is None else ids[name]


def _style(layout: dict[str, Any]) -> str:
    """How a token's text stands for bytes: "byte_level" (GPT-2's letters), "metaspace" (SentencePiece's), "opaque"."""

    def kinds(part: dict[str, Any] | None) -> set[str]:
        inner = [] if part is None else part.get("decoders", []) + part.get("pretokenizers", [])
        return set().union({part["type"]} if part else set(), *(kinds(entry) for entry in inner))

    found = kinds(layout.get("decoder"))
    if "ByteLevel" in found:
        return "byte_level"
    return "metaspace" if found & {"Metaspace", "ByteFallback"} else "opaque"


@functools.cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's printable letter of each byte, inverted: those without a printable one follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(value): value for value in printable}
    others = [value for value in range(256) if value not in printable]
    return letters | {chr(0x100 + index): value for index, value in enumerate(others)}


def _token_surface(piece: str, added: dict[str, Any] | None, style: str, unknown: str | None) -> bytes | None:
    if added is not None and added["special"]:
        return None if piece == unknown else b""
    if style == "opaque" or piece == unknown:
        return None
    if added is not None:
        return piece.encode()
    if style == "metaspace":
        return piece_bytes(piece)
    try:
        return bytes(map(_byte_letters().__getitem__, piece))
    except KeyError:  # a letter that stands for no byte
        return piece.encode()
