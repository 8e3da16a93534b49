"""Vocabularies: text <-> token ids, and how many bytes of source text each token stands for.

Three kinds behind one class: SentencePiece models, `tokenizer.json` of the `tokenizers` library, and plain bytes.
Only the file formats are read: no code comes with a tokenizer. Training one is data/tokenizer_training.py.

A token's `surface` is the bytes it stands for wherever it occurs. Where surfaces add up to the text (byte-level BPE,
byte fallback), counting bytes is a table look-up and decoding is a join; otherwise offsets in the text are used.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from t5x_like.core.errors import UserError

SETTINGS = "vocabulary.json"  # in a saved folder: kind, file and special ids
_BYTES_OFFSET = 3  # ids 0, 1, 2 are padding, end of text and unknown, as in ByT5 and seqio.ByteVocabulary
_UNKNOWN_BYTES = -(1 << 40)  # surface length of a token whose surface depends on the text: forces the offsets
_UNKNOWN_TEXT = " \u2047 ".encode()  # what SentencePiece decodes an unknown piece to
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


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer with its special ids. `size`: ids are below it; `surfaces[id]`: None where it depends on the text."""

    kind: str  # sentencepiece, tokenizers or bytes
    engine: Engine
    surfaces: tuple[bytes | None, ...]
    bos_id: int | None
    eos_id: int | None
    extra_ids: int  # ids without text behind those of the file (T5's sentinels)
    file_name: str  # "" for bytes
    content: bytes

    @property
    def size(self) -> int:
        return len(self.surfaces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal exactly when encode and decode are the same functions; 64 hexadecimal digits."""
        digest = hashlib.sha256(self.content)
        digest.update(json.dumps([self.kind, self.bos_id, self.eos_id, self.extra_ids]).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _surface_bytes(self) -> np.ndarray:
        return np.array([_UNKNOWN_BYTES if s is None else len(s) for s in self.surfaces], np.int64)

    @functools.cached_property
    def _begins_with_space(self) -> np.ndarray:
        return np.array([s is not None and s.startswith(b" ") for s in self.surfaces], bool)

    @functools.cached_property
    def adds_space(self) -> bool:
        """Whether encoding puts a space before the text (SentencePiece's dummy prefix)."""
        return self._join(self.engine.encode(["a"])[0]) == b" a"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text; `bos` and `eos` add those tokens where the vocabulary has them."""
        before = [self.bos_id] if bos and self.bos_id is not None else []
        after = [self.eos_id] if eos and self.eos_id is not None else []
        return [*before, *self.engine.encode([text])[0], *after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole document; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        ids = [int(token) for token in ids]
        decoded = self.engine.decode(ids)
        if decoded is not None:
            return decoded
        joined = self._join(ids)
        return (joined.removeprefix(b" ") if self.adds_space else joined).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of a continuation: of two parts they are the parts' bytes joined, so text can be streamed.

        Only for vocabularies whose surfaces are exact; others raise UserError (use `decode` on the whole).
        """
        if not self.exact:
            raise UserError(f"{self.file_name}: tokens of this tokenizer have no bytes of their own")
        return self._join([int(token) for token in ids])

    @functools.cached_property
    def exact(self) -> bool:
        """Whether decoding is joining surfaces."""
        return self.engine.decode([]) is None

    def encode_batch(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "tokens"], Int[np.ndarray, "texts"]]:
        """All ids one after the other, and the number of ids of each text; no special tokens."""
        encoded = self.engine.encode(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat: list[int] = []
        for ids in encoded:
            flat += ids
        return np.array(flat, np.int32), lengths

    def count_bytes(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray) -> Int[np.ndarray, "tokens"]:
        """UTF-8 bytes of its text that each token of `encode_batch(texts)` stands for; they add up to the text.

        A space that encoding put before the text counts 0. Where surfaces do not add up, offsets decide.
        """
        counts = self._surface_bytes[ids]
        begins = np.cumsum(lengths) - lengths
        totals = np.concatenate([[0], np.cumsum(counts)])
        sums = totals[begins + lengths] - totals[begins]
        for index, text in enumerate(texts):
            if lengths[index] == 0:
                continue
            begin, expected = begins[index], len(text) if text.isascii() else len(text.encode())
            added = self.adds_space and not text.startswith(" ")
            if sums[index] == expected and not added:
                continue
            if sums[index] == expected + 1 and self._begins_with_space[ids[begin]]:
                counts[begin] -= 1
            else:
                counts[begin : begin + lengths[index]] = self.engine.count_bytes(text)
        return counts

    def save(self, directory: str) -> None:
        """Writes the tokenizer's own file and `vocabulary.json`, which `load(directory)` reads."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "kind": self.kind,
            "file": self.file_name,
            "size": self.size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "extra_ids": self.extra_ids,
            "sha256": hashlib.sha256(self.content).hexdigest(),
            "fingerprint": self.fingerprint,
        }
        if self.file_name:
            _write(folder / self.file_name, self.content)
        _write(folder / SETTINGS, json.dumps(settings, indent=1).encode() + b"\n")

    def _join(self, ids: Sequence[int]) -> bytes:
        known = (self.surfaces[token] for token in ids if 0 <= token < self.size)
        return b"".join(_UNKNOWN_TEXT if surface is None else surface for surface in known)


def load(path: str) -> Vocabulary:
    """`bytes`, a tokenizer file, or a folder with one (a `tokenizer/` folder of a workdir, or Hugging Face's)."""
    if path == "bytes":
        return _bytes_vocabulary(extra_ids=0)
    place = pathlib.Path(path)
    if place.is_dir():
        return _load_folder(place)
    if not place.is_file():
        raise UserError(f"tokenizer {path}: no such file; give a tokenizer.json, a SentencePiece model or 'bytes'")
    content = place.read_bytes()
    if content.lstrip()[:1] == b"{":
        return tokenizers_vocabulary(content, place, _special_names(place.parent))
    return sentencepiece_vocabulary(content, place, extra_ids=0)


def _load_folder(folder: pathlib.Path) -> Vocabulary:
    if (folder / SETTINGS).is_file():
        return _load_saved(folder)
    if (folder / "tokenizer.json").is_file():
        return load(str(folder / "tokenizer.json"))
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise UserError(f"tokenizer {folder}: needs {SETTINGS}, tokenizer.json or one *.model, has {len(models)} *.model")
    return load(str(models[0]))


def _load_saved(folder: pathlib.Path) -> Vocabulary:
    where = folder / SETTINGS
    try:
        settings = json.loads(where.read_text())
        kind, name = settings["kind"], settings["file"]
        content = (folder / name).read_bytes() if name else b""
        if hashlib.sha256(content).hexdigest() != settings["sha256"]:
            raise UserError(f"{folder / name}: its sha256 is not the one in {where}; copy the folder again")
        if kind == "bytes":
            return _bytes_vocabulary(extra_ids=settings["extra_ids"])
        if kind == "sentencepiece":
            return sentencepiece_vocabulary(content, folder / name, extra_ids=settings["extra_ids"])
        loaded = tokenizers_vocabulary(content, folder / name, (None, None))
        return dataclasses.replace(loaded, bos_id=settings["bos_id"], eos_id=settings["eos_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a saved vocabulary ({error}); copy the folder again") from None


# Bytes.


class _Bytes:
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [(np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _BYTES_OFFSET).tolist() for text in texts]

    def count_bytes(self, text: str) -> list[int]:
        return [1] * len(text.encode())

    def decode(self, ids: list[int]) -> str | None:
        return None


def _bytes_vocabulary(*, extra_ids: int) -> Vocabulary:
    surfaces = (b"",) * _BYTES_OFFSET + tuple(bytes([value]) for value in range(256)) + (b"",) * extra_ids
    return Vocabulary("bytes", _Bytes(), surfaces, None, 1, extra_ids, "", b"")


# SentencePiece.


class _SentencePiece:
    def __init__(self, processor: Any):
        self._processor = processor

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def count_bytes(self, text: str) -> list[int]:
        try:
            proto = self._processor.encode(text, out_type="proto")
        except ValueError:  # the name before sentencepiece 0.2.2
            proto = self._processor.encode(text, out_type="immutable_proto")
        counts = [len(piece.surface.encode()) for piece in proto.pieces]
        return _spread(counts, [self._processor.is_byte(piece.id) for piece in proto.pieces], len(text.encode()))

    def decode(self, ids: list[int]) -> str | None:
        return None


def sentencepiece_vocabulary(content: bytes, path: pathlib.Path, *, extra_ids: int) -> Vocabulary:
    """From a serialized SentencePiece model; `path` is its name in messages and when saved."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: not a SentencePiece model nor a tokenizer.json") from None
    size = processor.get_piece_size()
    surfaces = [_sentencepiece_surface(processor, token) for token in range(size)] + [b""] * extra_ids
    bos, eos = processor.bos_id(), processor.eos_id()
    return Vocabulary(
        "sentencepiece",
        _SentencePiece(processor),
        tuple(surfaces),
        bos if bos >= 0 else None,
        eos if eos >= 0 else None,
        extra_ids,
        "tokenizer.model",
        content,
    )


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
    def __init__(self, tokenizer: Any, *, exact: bool):
        self._tokenizer, self._exact = tokenizer, exact

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def count_bytes(self, text: str) -> list[int]:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return _counts_from_offsets(text, offsets)

    def decode(self, ids: list[int]) -> str | None:
        return None if self._exact else self._tokenizer.decode(ids, skip_special_tokens=True)


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


def tokenizers_vocabulary(content: bytes, path: pathlib.Path, names: tuple[str | None, str | None]) -> Vocabulary:
    import tokenizers

    try:
        layout = json.loads(content)
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer.json ({str(error).splitlines()[0]})") from None
    tokenizer.encode_special_tokens = True  # a text that spells out <|endoftext|> is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    style = _style(layout)
    added = {token["id"]: token for token in layout.get("added_tokens", [])}
    pieces = {token: piece for piece, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    unknown = (layout.get("model") or {}).get("unk_token")
    surfaces: list[bytes | None] = [b""] * (max(pieces, default=-1) + 1)
    for token, piece in pieces.items():
        surfaces[token] = _token_surface(piece, added.get(token), style, unknown)
    ids = {piece: token for token, piece in pieces.items()}
    bos, eos = (_named(ids, name, path) for name in names)
    specials = {token["content"]: token["id"] for token in added.values() if token["special"]}
    bos = next((specials[n] for n in _BOS_NAMES if n in specials), None) if names == (None, None) else bos
    eos = next((specials[n] for n in _EOS_NAMES if n in specials), None) if eos is None else eos
    bos = None if bos == eos else bos  # GPT-2 names one token twice: documents are then separated by one, not two
    engine = _Tokenizers(tokenizer, exact=style != "opaque")
    return Vocabulary("tokenizers", engine, tuple(surfaces), bos, eos, 0, "tokenizer.json", content)


def _named(ids: dict[str, int], name: str | None, path: pathlib.Path) -> int | None:
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
    letters = _byte_letters()
    return bytes(letters[letter] for letter in piece) if all(letter in letters for letter in piece) else piece.encode()


def _special_names(folder: pathlib.Path) -> tuple[str | None, str | None]:
    """(bos, eos) as `tokenizer_config.json` names them, None where it does not."""
    place = folder / "tokenizer_config.json"
    if not place.is_file():
        return None, None
    try:
        settings = json.loads(place.read_text())
        named = [settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = (name["content"] if isinstance(name, dict) else name for name in named)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{place}: not the JSON of a tokenizer ({error})") from None
    return bos, eos


def _write(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(content)
    temporary.replace(path)
