"""What tokenizer files say: SentencePiece models, `tokenizer.json` of the `tokenizers` library, and plain bytes.

Each becomes a `TokenizerFile`: an engine that encodes, and per token its `surface`, the bytes that it stands for
wherever it occurs. Only the formats are read: no code comes with a tokenizer. What the project does with one
(counting bytes, decoding, saving) is data/tokenizers/vocabularies.py.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import cuts, sentencepiece_files, spelled_tokens
from t5x_like.data.tokenizers.added_tokens import AddedToken, Division
from t5x_like.data.tokenizers.word_cache import WordCache, pattern_of

_BYTES_OFFSET = 3  # ids 0, 1, 2 are padding, end of text and unknown, as in ByT5 and seqio.ByteVocabulary
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[SEP]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[CLS]")


class Engine(Protocol):
    """What a tokenizer library has to give. Special tokens written out in a text are plain text."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def count_bytes(self, text: str) -> list[int]:
        """Bytes of `text` per token of `encode([text])[0]`, from offsets; adds up to all bytes."""
        ...

    def decode(self, ids: list[int]) -> str | None:
        """None when joining surfaces is exact."""
        ...

    def encode_parts(self, parts: Sequence[str | int]) -> list[tuple[list[int], list[int]]]:
        """(ids, bytes per id) of each text of `parts`, between which special tokens stand; of those, nothing."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as its file describes it. `surfaces[id]` is None where it depends on the text (unknown tokens)."""

    kind: str  # bytes, sentencepiece or tokenizers
    name: str  # of the file when it is saved, "" for bytes
    content: bytes
    engine: Engine
    surfaces: tuple[bytes | None, ...]
    bos_id: int | None
    eos_id: int | None
    extra_ids: int  # ids without text behind those of the file (T5's sentinels)
    cuts: str  # a pattern of the places where a text may be cut in two without other ids, "" for none
    named_sentinels: int  # ids at the end that the file itself names <extra_id_0> (the last one), <extra_id_1>, ...
    added: tuple[AddedToken, ...] = ()  # behind the pieces of a SentencePiece model
    legacy: bool = False  # with those: a space is put before the text behind one too
    specials: tuple[tuple[str, int], ...] = ()  # tokens that no text gives, by name
    rounds: bool = False  # adds up rounded scores along a text, so that near ties depend on how long it is
    found: tuple[str, ...] = ()  # added tokens that are found in a text
    hides_sentinels: bool = False  # has <extra_id_0>, and not as its last id


# Bytes.


class _Bytes:
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [(np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _BYTES_OFFSET).tolist() for text in texts]

    def count_bytes(self, text: str) -> list[int]:
        return [1] * len(text.encode())

    def decode(self, ids: list[int]) -> str | None:
        return None

    def encode_parts(self, parts: Sequence[str | int]) -> list[tuple[list[int], list[int]]]:
        return [([], []) if isinstance(p, int) else (self.encode([p])[0], self.count_bytes(p)) for p in parts]


def read_bytes(*, extra_ids: int) -> TokenizerFile:
    surfaces = (b"",) * _BYTES_OFFSET + tuple(bytes([value]) for value in range(256)) + (b"",) * extra_ids
    specials = (("<pad>", 0), ("</s>", 1))
    file = TokenizerFile("bytes", "", b"", _Bytes(), surfaces, None, 1, extra_ids, cuts.ANYWHERE, named_sentinels=0)
    return dataclasses.replace(file, specials=specials)


# SentencePiece.


class _SentencePiece:
    def __init__(self, processor: Any, division: Division, plain: Any, *, legacy: bool):
        self._processor, self._division, self._plain, self._legacy = processor, division, plain, legacy

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._division.divides:
            return self._encode(texts)
        return [[*self._division.encode(text, self._encode, self._encode_later)] for text in texts]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def _encode_later(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._behind_added(text).encode(text, num_threads=1) for text in texts]

    def _behind_added(self, text: str) -> Any:
        """What encodes a text behind an added token: `plain` puts no space before it."""
        return self._processor if self._legacy and not text.startswith(" ") else self._plain

    def encode_parts(self, parts: Sequence[str | int]) -> list[tuple[list[int], list[int]]]:
        first = next((index for index, part in enumerate(parts) if part != ""), 0)
        return [
            ([], [])
            if isinstance(part, int)
            else (self._encode_part(part, later=index > first), self._count(part, later=index > first))
            for index, part in enumerate(parts)
        ]

    def _encode_part(self, text: str, *, later: bool) -> list[int]:
        return [*self._division.encode(text, self._encode_later if later else self._encode, self._encode_later)]

    def count_bytes(self, text: str) -> list[int]:
        return self._count(text, later=False)

    def _count(self, text: str, *, later: bool) -> list[int]:
        counts: list[int] = []
        divided = self._division.divide(text)
        contents = self._division.contents
        for index, part in enumerate(divided):
            if isinstance(part, int):
                counts.append(len(contents[part].encode()))
            elif part:
                behind = index > 0 or later
                found = _count_pieces(self._behind_added(part) if behind else self._processor, part)
                if not found and counts:
                    counts[-1] += len(part.encode())
                counts += found
        return counts

    def decode(self, ids: list[int]) -> str | None:
        return None


def _count_pieces(processor: Any, text: str) -> list[int]:
    try:
        proto = processor.encode(text, out_type="proto")
    except ValueError:  # the name before sentencepiece 0.2.2
        proto = processor.encode(text, out_type="immutable_proto")
    counts = [len(piece.surface.encode()) for piece in proto.pieces]
    return _spread(counts, [processor.is_byte(piece.id) for piece in proto.pieces], len(text.encode()))


# A second normalizer_spec of a ModelProto, which protobuf merges into the first: add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def read_sentencepiece(
    content: bytes,
    path: pathlib.Path,
    *,
    extra_ids: int,
    added: Sequence[AddedToken] = (),
    legacy: bool = False,
) -> TokenizerFile:
    """From a serialized SentencePiece model; `path` is its name in messages. `added` stand behind its pieces."""
    processor = _processor(content, path)
    size = processor.get_piece_size()
    for token in added:
        if token.id < size and processor.id_to_piece(token.id) != token.content:
            raise UserError(
                f"{path}: its token {token.id} is {processor.id_to_piece(token.id)!r}, and the files beside it add "
                f"{token.content!r} with the same id; give the model that the added tokens belong to"
            )
    more = tuple(token for token in added if token.id >= size)
    surfaces = [_sentencepiece_surface(processor, token) for token in range(size)]
    surfaces += [b""] * (max((token.id + 1 for token in more), default=size) - size)
    for token in more:
        surfaces[token.id] = b"" if token.special else token.content.encode()
    division = Division(more)
    plain = _processor(content + _NO_DUMMY_PREFIX, path)
    bos, eos = processor.bos_id(), processor.eos_id()
    return TokenizerFile(
        "sentencepiece",
        "tokenizer.model",
        content,
        _SentencePiece(processor, division, plain, legacy=legacy),
        (*surfaces, *(b"",) * extra_ids),
        bos if bos >= 0 else None,
        eos if eos >= 0 else None,
        extra_ids,
        cuts.between_tokens(surfaces),
        named_sentinels=0 if more else _named_sentinels(processor.id_to_piece, size),
        added=more,
        legacy=legacy and bool(more),
        rounds=sentencepiece_files.read(content, path).kind == sentencepiece_files.UNIGRAM,
        found=tuple(division.contents.values()),
        hides_sentinels=any(token.content == "<extra_id_0>" for token in more),
        specials=(
            *((processor.id_to_piece(token), token) for token in range(size) if processor.is_control(token)),
            *((token.content, token.id) for token in more if token.special),
        ),
    )


def token_ids(file: TokenizerFile, content: bytes, path: pathlib.Path) -> dict[str, int]:
    """{piece: id} of a SentencePiece model and its added tokens."""
    processor = _processor(content, path)
    pieces = {processor.id_to_piece(token): token for token in range(processor.get_piece_size())}
    return pieces | {token.content: token.id for token in file.added}


def _processor(content: bytes, path: pathlib.Path) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: not a SentencePiece model nor a tokenizer.json") from None
    return processor


def _sentencepiece_surface(processor: Any, token: int) -> bytes | None:
    if processor.is_unknown(token):
        return None
    if processor.is_control(token) or processor.is_unused(token):
        return b""
    return _piece_bytes(processor.id_to_piece(token))


def _piece_bytes(piece: str) -> bytes:
    """`<0x0A>` is one byte, U+2581 a space, everything else itself."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _spread(counts: list[int], is_byte: list[bool], total: int) -> list[int]:
    """Corrects counts from spans: byte pieces of one character hold one byte each, and all add up to `total`."""
    counts = list(counts)
    begin = 0
    while begin < len(counts):
        end = begin
        while end < len(counts) and is_byte[end]:
            end += 1
        if end > begin and sum(counts[begin:end]) == end - begin:
            counts[begin:end] = [1] * (end - begin)
        begin = end + 1
    if counts:
        counts[-1] += total - sum(counts)  # what the tokenizer dropped at the end, such as a last newline
    return counts


# tokenizer.json


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


def read_tokenizer_json(content: bytes, path: pathlib.Path, names: tuple[str | None, str | None]) -> TokenizerFile:
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
    named = _named_sentinels(lambda token: pieces.get(token, ""), len(surfaces))
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


def _named_sentinels(name: Callable[[int], str], size: int) -> int:
    count = 0
    while count < size and name(size - 1 - count) == f"<extra_id_{count}>":
        count += 1
    return count


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
        return _piece_bytes(piece)
    try:
        return bytes(map(_byte_letters().__getitem__, piece))
    except KeyError:  # a letter that stands for no byte
        return piece.encode()
