"""What a SentencePiece model file holds, read from its bytes.

The library itself tells neither the kind of model nor how it normalizes, and its generated classes want the very
version of protobuf that they were made with. Four fields are needed: https://protobuf.dev/programming-guides/encoding.
"""

import dataclasses
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

from t5x_like.core.errors import UserError

UNIGRAM, BPE = 1, 2  # kinds of models
CONTROL, USER_DEFINED = 3, 4  # types of pieces
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the file
_PIECE, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL_TYPE, _CHARSMAP = 3, 2  # of the trainer's and of the normalizer's settings
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how a field is written


@dataclasses.dataclass(frozen=True)
class SentencePieceFile:
    """Pieces as (text, score, type), by id; `charsmap` is what the text is normalized by, b"" for nothing."""

    pieces: tuple[tuple[str, float, int], ...]
    kind: int
    charsmap: bytes


def read(content: bytes, path: pathlib.Path) -> SentencePieceFile:
    """Of a serialized model; UserError, which names `path`, for bytes that are none."""
    pieces: list[tuple[str, float, int]] = []
    kind, charsmap = UNIGRAM, b""
    try:
        for field, value in _fields(content):
            if field == _PIECES:
                parts = dict(_fields(value))
                score = struct.unpack("<f", parts.get(_SCORE, bytes(4)))[0]
                pieces.append((parts.get(_PIECE, b"").decode(), score, parts.get(_TYPE, 1)))
            elif field == _TRAINER:
                kind = dict(_fields(value)).get(_MODEL_TYPE, kind)
            elif field == _NORMALIZER:
                charsmap = dict(_fields(value)).get(_CHARSMAP, charsmap)
    except (IndexError, ValueError, TypeError, AttributeError, struct.error):
        pieces = []
    if not pieces:
        raise UserError(f"{path}: not a SentencePiece model")
    return SentencePieceFile(tuple(pieces), kind, charsmap)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        form = key & 7
        if form == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(form)
        if form == _BYTES:
            length, at = _varint(message, at)
        if length is None or at + length > len(message):
            raise ValueError("not a message")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(number, the place behind it): seven bits a byte, the lowest first."""
    number = shift = 0
    while message[at] & 0x80:
        number |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return number | message[at] << shift, at + 1
