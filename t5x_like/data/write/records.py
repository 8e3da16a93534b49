"""What every reader of a file gives: records, each with its place, and the words for one that cannot be used."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from t5x_like.core.errors import UserError

BOM = b"\xef\xbb\xbf"


class MissingSource(UserError):
    """The files of a source are not on this machine; a complete cache of them can still be read."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file (tfds: folder and split) of `measure` bytes or records that take `size` bytes on disk.

    Bytes are those of the content: of a compressed file they are counted behind decompression, and `size` too.
    starts: the offsets at which reading may begin, in order: row groups, or the begin alone. None: any offset
    """

    path: str
    measure: int
    size: int
    starts: tuple[int, ...] | None = None


class Record(NamedTuple):
    """A dict of fields and where it begins. `problem`: why it cannot be read, in words; then it has no fields."""

    offset: int
    fields: dict[str, Any]
    problem: str = ""


# (path, begin, end, names of the fields that are wanted: () for all) -> the records that begin in [begin, end)
Reader = Callable[[str, int, int, tuple[str, ...]], Iterator[Record]]


def bad(offset: int, problem: str) -> Record:
    return Record(offset, {}, problem)


def not_utf8(content: bytes, error: UnicodeDecodeError, offset: int) -> str:
    """The words for bytes that begin at `offset` of their file."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "the text is UTF-16, not UTF-8; convert the file (iconv -f utf-16 -t utf-8)"
    at = offset + error.start
    return f"byte {content[error.start]:#04x} at offset {at} is not UTF-8; convert the file (iconv -t utf-8)"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
