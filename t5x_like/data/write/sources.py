"""Sources named in a config (`jsonl:PATH`, ...): which files, how they are divided, and the records in them.

A record is a dict of fields with its place (file, offset). Offsets are bytes for text, lines, jsonl and csv, and
record numbers for parquet and tfds. A `Piece` is a range of offsets of one file; a record belongs to the piece in
which it begins, so any division of a file gives the same records. Nothing here imports TensorFlow; the adapter of
SeqIO is data/write/tasks.py.
"""

import csv
import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError


class MissingSource(UserError):
    """The files of a source are not on this machine; a complete cache of them can still be read."""


@dataclasses.dataclass(frozen=True)
class Source:
    """`kind:path`; for tfds and seqio `name` holds what follows the path: a split, or a task and its split."""

    kind: str
    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" + (f":{self.name}" if self.name else "")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file (tfds: folder and split) of `measure` bytes or records that take `size` bytes on disk."""

    path: str
    measure: int
    size: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """The records of file number `file` of a source that begin at offsets in [begin, end)."""

    file: int
    begin: int
    end: int


class Record(NamedTuple):
    """A dict of fields and where it begins."""

    offset: int
    fields: dict[str, Any]


Reader = Callable[[str, int, int], Iterator[Record]]


def parse(text: str, *, where: str) -> Source:
    """A source from its text; UsageError where it is none. `where` is the config path, for messages."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS or not rest:
        hint = nearest(kind, KINDS)
        raise UsageError(f"{where}={text!r} should be KIND:PATH; kind {kind!r}: {hint}")
    if kind == "seqio":
        module, _, task = rest.partition(":")
        if not task:
            raise UsageError(f"{where}={text!r} should be seqio:MODULE_OR_FILE:TASK_OR_MIXTURE[:SPLIT]")
        return Source(kind, module, task)
    if kind == "tfds":
        folder, _, split = rest.partition(":")
        return Source(kind, folder, split or "train")
    return Source(kind, rest, "")


def files(source: Source, *, where: str) -> list[SourceFile]:
    """The files of a native source in order of name. UserError for none, an empty one, or an unreadable one."""
    if source.kind == "tfds":
        return [_tfds_file(source, where)]
    paths = sorted(glob.glob(source.path, recursive=True)) if glob.has_magic(source.path) else [source.path]
    if not paths:
        raise MissingSource(f"{where}={source}: no file has a name like this")
    return [_file(source.kind, path, where) for path in paths]


def divide(kind: str, sizes: Sequence[SourceFile], begin: int, end: int, target: int) -> list[list[Piece]]:
    """The range [begin, end) of all files' measures in a row, as groups of pieces of about `target` bytes on disk.

    Depends on nothing else, so that a token cache does not depend on how many processes write it.
    """
    groups: list[list[Piece]] = [[]]
    filled, first = 0.0, 0
    for index, file in enumerate(sizes):
        low, high = max(begin, first) - first, min(end, first + file.measure) - first
        first += file.measure
        weight = file.size / max(file.measure, 1)
        step = max(int(target / max(weight, 1e-9)), 1) if KINDS[kind].divisible else high - low
        while low < high:
            stop = min(low + step, high)
            groups[-1].append(Piece(index, low, stop))
            filled += (stop - low) * weight
            low = stop
            if filled >= target:
                groups.append([])
                filled = 0.0
    return [group for group in groups if group]


def pieces(kind: str, sizes: Sequence[SourceFile], begin: int, end: int) -> list[Piece]:
    """The same range, one piece a file."""
    return [piece for group in divide(kind, sizes, begin, end, 1 << 62) for piece in group]


def read(kind: str, path: str, begin: int, end: int, *, name: str) -> Iterator[Record]:
    """The records of a file that begin in [begin, end)."""
    return KINDS[kind].read(f"{path}\n{name}" if kind == "tfds" else path, begin, end)


def unit(kind: str) -> str:
    """What offsets of this kind count: "byte" or "record"."""
    return "record" if kind in ("parquet", "tfds", "seqio") else "byte"


_USUAL_NAMES = {"text": "*.txt", "lines": "*.txt", "jsonl": "*.jsonl", "csv": "*.csv", "parquet": "*.parquet"}


def _file(kind: str, path: str, where: str) -> SourceFile:
    if os.path.isdir(path):
        raise UserError(f"{where}={kind}:{path}: is a folder; give {os.path.join(path, _USUAL_NAMES[kind])}")
    if not os.path.isfile(path):
        raise MissingSource(f"{where}={kind}:{path}: no such file")
    try:
        with open(path, "rb"):
            size = os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    measure = KINDS[kind].measure(path) if size else 0
    if not measure:
        raise UserError(f"{path}: the file is empty; {where} needs text")
    return SourceFile(path, measure, size)


def _decode(content: bytes, path: str, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(
            f"{path}: byte {content[error.start]:#04x} at offset {at} is not UTF-8; convert the file (iconv -t utf-8)"
        ) from None


# text: one document a file, cut (for held-out text) where a character begins


def _read_text(path: str, begin: int, end: int) -> Iterator[Record]:
    record = _text_record(path, begin, end)
    if record is not None:
        yield record


def _text_record(path: str, begin: int, end: int) -> Record | None:
    """A function of its own, so that the bytes of a large file are gone while its text is used."""
    with open(path, "rb") as file:
        file.seek(begin)
        content = file.read(end - begin + 3)  # a character that straddles the end has at most 3 more bytes
    first = _character_start(content, 0) if begin else 0
    last = min(_character_start(content, end - begin), len(content))
    if last <= first:
        return None
    return Record(begin + first, {"text": _decode(content[first:last], path, begin + first)})


def _character_start(content: bytes, at: int) -> int:
    """The first position from `at` on where a UTF-8 character begins (continuation bytes are 10xxxxxx)."""
    while at < len(content) and content[at] & 0xC0 == 0x80:
        at += 1
    return at


# lines, jsonl: records end at "\n" alone, since texts may hold U+2028 or U+0085


def _lines(path: str, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its end) of every line that begins in [begin, end)."""
    with open(path, "rb") as file:
        offset = begin
        if begin:
            file.seek(begin - 1)
            offset = begin - 1 + len(file.readline())  # through the end of the line that begins before
        for line in file:
            if offset >= end:
                return
            yield offset, line.removesuffix(b"\n")
            offset += len(line)


def _read_lines(path: str, begin: int, end: int) -> Iterator[Record]:
    for offset, line in _lines(path, begin, end):
        yield Record(offset, {"text": _decode(line, path, offset).removesuffix("\r")})


def _read_jsonl(path: str, begin: int, end: int) -> Iterator[Record]:
    for offset, line in _lines(path, begin, end):
        text = _decode(line, path, offset)
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for what is nested very deep
            raise UserError(f"{path}: the line at byte {offset} is not JSON ({error}): {text[:60]!r}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}: the line at byte {offset} should be a JSON object, is {text[:60]!r}")
        yield Record(offset, fields)


# csv: a field may span lines, so a file is always read from its beginning


def _read_csv(path: str, begin: int, end: int) -> Iterator[Record]:
    position = 0

    def counted() -> Iterator[str]:
        nonlocal position
        with open(path, "rb") as file:
            for line in file:
                text = _decode(line, path, position)
                position += len(line)
                yield text.removeprefix("\ufeff") if position == len(line) else text

    rows = csv.reader(counted(), strict=True)
    csv.field_size_limit(1 << 30)
    try:
        header = next(rows)
        twice = [name for index, name in enumerate(header) if name and name in header[:index]]
        if twice:
            raise UserError(f"{path}: the header names {twice[0]!r} twice; give each column a name of its own")
        while True:
            offset = position
            values = next(rows, None)
            if values is None or offset >= end:
                return
            if offset < begin or not values:
                continue
            if len(values) != len(header):
                raise UserError(f"{path}: the row at byte {offset} has {len(values)} fields, the header {len(header)}")
            yield Record(offset, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}: not csv before byte {position} ({error})") from None


# parquet, tfds: offsets are record numbers


def _read_parquet(path: str, begin: int, end: int) -> Iterator[Record]:
    file, first = _parquet(path), 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < end and first + rows > begin:
            for index, fields in enumerate(_row_group(file, path, group), first):
                if begin <= index < end:
                    yield Record(index, fields)
        first += rows


def _row_group(file: Any, path: str, group: int) -> list[dict[str, Any]]:
    import pyarrow

    try:
        return file.read_row_group(group).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged page; a text that is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: row group {group} cannot be read ({reason}); copy or write the file again") from None


def _parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _tfds(folder: str, split: str) -> Any:
    """A random-access data source over an ArrayRecord folder, which tfds reads without TensorFlow."""
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError("tfds: sources need tensorflow-datasets; pip install 't5x_like[data]'") from None
    try:
        builder: Any = tensorflow_datasets.builder_from_directory(folder)
        return builder.as_data_source(split)
    except Exception as error:  # tfds raises many kinds for a wrong folder, split or format
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"tfds:{folder}:{split}: not readable as an ArrayRecord data set ({text[0]})") from None


def _tfds_file(source: Source, where: str) -> SourceFile:
    if not os.path.isdir(source.path):
        raise MissingSource(f"{where}={source}: no such folder")
    records = len(_tfds(source.path, source.name))
    parts = pathlib.Path(source.path).glob("*array_record*")
    size = sum(part.stat().st_size for part in parts if f"-{source.name.partition('[')[0]}." in part.name)
    if not records:
        raise UserError(f"{where}={source}: the split is empty")
    return SourceFile(source.path, records, size)


def _read_tfds(path: str, begin: int, end: int) -> Iterator[Record]:
    folder, split = path.split("\n")
    data = _tfds(folder, split)
    for first in range(begin, end, 256):
        chunk = range(first, min(first + 256, end))
        for index, fields in zip(chunk, data.__getitems__(list(chunk)), strict=True):
            yield Record(index, {key: _plain(value, path, index) for key, value in fields.items()})


def _plain(value: Any, path: str, index: int) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path.splitlines()[0]}: record {index} is not UTF-8") from None
    return value


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to read records, how to measure a file, and whether it can be read from the middle."""

    read: Reader
    measure: Callable[[str], int]
    divisible: bool


def _no_reader(path: str, begin: int, end: int) -> Iterator[Record]:
    raise UserError(f"seqio:{path} is read by data/write/tasks.py")


KINDS = {
    "text": Kind(_read_text, os.path.getsize, False),
    "lines": Kind(_read_lines, os.path.getsize, True),
    "jsonl": Kind(_read_jsonl, os.path.getsize, True),
    "csv": Kind(_read_csv, os.path.getsize, False),
    "parquet": Kind(_read_parquet, lambda path: _parquet(path).metadata.num_rows, True),
    "tfds": Kind(_read_tfds, lambda path: 0, True),
    "seqio": Kind(_no_reader, lambda path: 0, True),
}
