"""What a tokenizer's file says, whatever its format: a `TokenizerFile`, and that of plain bytes, which has no file.

An engine encodes, and each token has a `surface`, the bytes that it stands for wherever it occurs. Only the formats are
read: no code comes with a tokenizer. SentencePiece models: sentencepiece_engine.py; `tokenizer.json`:
tokenizers_engine.py. What the project does with one (counting bytes, decoding, saving) is vocabularies.py.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from t5x_like.data.tokenizers import cuts
from t5x_like.data.tokenizers.added_tokens import AddedToken

_BYTES_OFFSET = 3  # ids 0, 1, 2 are padding, end of text and unknown, as in ByT5 and seqio.ByteVocabulary


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


def named_sentinels(name: Callable[[int], str], size: int) -> int:
    """How many ids at the end are named <extra_id_0> (the last one), <extra_id_1>, ...; name: of an id."""
    count = 0
    while count < size and name(size - 1 - count) == f"<extra_id_{count}>":
        count += 1
    return count


def piece_bytes(piece: str) -> bytes:
    """`<0x0A>` is one byte, U+2581 a space, everything else itself."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
