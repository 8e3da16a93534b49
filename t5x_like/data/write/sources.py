"""Sources named in a config (`jsonl:PATH`, ...): which files, how they are divided, and the records in them.

A record is a dict of fields with its place (file, offset). Offsets are bytes for text, lines, jsonl and csv, and
record numbers for parquet, arrow and tfds. A `Piece` is a range of offsets of one file; a record belongs to the piece
in which it begins, so any division of a file gives the same records. The readers are text_readers.py, csv_reader.py,
table_readers.py and tfds_reader.py. Nothing here imports TensorFlow; the adapter of SeqIO is data/write/tasks.py.
"""

import bisect
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.write import content, csv_reader, memory, table_readers, text_readers, tfds_reader
from t5x_like.data.write.records import MissingSource, Reader, Record, SourceFile
from t5x_like.storage import paths, patterns

__all__ = ["MissingSource", "Piece", "Record", "Source", "SourceFile", "divide", "files", "parse", "pieces", "read"]

_SHIPPED = pathlib.Path(__file__).parents[2] / "configs" / "data"
_READ_TWICE = 8  # a job begins anew where that reads no more than this part of it twice


@dataclasses.dataclass(frozen=True)
class Source:
    """`kind:path`; for tfds and seqio `name` holds what follows the path: a split, or a task and its split."""

    kind: str
    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" + (f":{self.name}" if self.name else "")


@dataclasses.dataclass(frozen=True)
class Piece:
    """The records of file number `file` of a source that begin at offsets in [begin, end)."""

    file: int
    begin: int
    end: int


def parse(text: str, *, where: str) -> Source:
    """A source from its text; UsageError where it is none. `where` is the config path, for messages."""
    kind, _, rest = text.partition(":")
    if kind not in KINDS or not rest:
        hint = nearest(kind, KINDS)
        raise UsageError(f"{where}={text!r} should be KIND:PATH; kind {kind!r}: {hint}")
    if kind == "seqio":
        if paths.is_remote(rest):
            raise UsageError(f"{where}={text!r}: a module is a program and is read from a disk; copy it there")
        module, _, task = rest.partition(":")
        if not task:
            raise UsageError(f"{where}={text!r} should be seqio:MODULE_OR_FILE:TASK_OR_MIXTURE[:SPLIT]")
        return Source(kind, os.path.expanduser(_one(module, f"{where}=seqio:")), task)
    if kind == "tfds":
        match = re.fullmatch(r"((?:gs://)?[^:]*):?(.*)", rest, re.DOTALL)
        folder, split = match.groups() if match else (rest, "")
        return Source(kind, folder, split or "train")
    return Source(kind, rest, "")


def files(
    source: Source, *, where: str, folder: pathlib.Path | None = None, share: memory.Share | None = None
) -> list[SourceFile]:
    """The files of a native source. UserError for none, or where all are empty, or one is unreadable.

    Empty files are among them, with measure 0. folder: that of a cache, which remembers how long compressed files are
    """
    place = f"{where}={source}"
    try:
        if source.kind == "tfds":
            data_set = paths.normal(_one(source.path, f"{where}=tfds:"))
            return [tfds_reader.tfds_file(data_set, source.name, where=place)]
        names = _names(source, place)
    except UserError as error:
        if not paths.is_remote(source.path):
            raise
        raise MissingSource(str(error)) from None  # a bucket that cannot be reached: the cache may be enough
    found = _measured(source.kind, names, folder, share)
    if not any(file.measure for file in found):
        which = f"all {len(found)} files are empty" if len(found) > 1 else "the file is empty"
        raise UserError(f"{names[0]}: {which}; {where} needs text")
    return found


def _one(text: str, what: str) -> str:
    try:
        return patterns.one(text, what=what)
    except UserError as error:
        raise MissingSource(str(error)) from None


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
        divisible = KINDS[kind].divisible or file.starts is not None
        step = max(int(target / max(weight, 1e-9)), 1) if divisible else high - low
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


def chains(files: Sequence[SourceFile], groups: Sequence[Sequence[Piece]]) -> list[list[int]]:
    """The indices of consecutive groups that are best read in one go: elsewhere little would be read twice.

    What is read twice is what lies between a group's first offset and the place before it at which reading may begin
    (`SourceFile.starts`). Depends on files and groups alone; what the groups hold does not depend on it.
    """
    result: list[list[int]] = []
    size = 0.0
    for index, group in enumerate(groups):
        first, before = group[0], groups[index - 1][-1] if index else None
        joined = before is not None and (before.file, before.end) == (first.file, first.begin)
        if result and joined and _twice(files[first.file], first.begin) * _READ_TWICE > size:
            result[-1].append(index)
        else:
            result.append([index])
            size = 0.0
        size += sum((piece.end - piece.begin) * _weight(files[piece.file]) for piece in group)
    return result


def _twice(file: SourceFile, offset: int) -> float:
    if file.starts is None:
        return 0.0
    place = bisect.bisect_right(file.starts, offset) - 1
    return (offset - file.starts[max(place, 0)]) * _weight(file)


def _weight(file: SourceFile) -> float:
    return file.size / max(file.measure, 1)


class Cursor:
    """The records of pieces, which are asked for in order; pieces that follow each other are read in one go."""

    def __init__(self, read: Callable[[int, int, int], Iterator[Record]], pieces: Sequence[Piece]):
        """`read(file, begin, end)` opens a file anew."""
        self._read = read
        self._ends: dict[Piece, int] = {}
        for piece, after in zip(reversed(pieces), [None, *reversed(pieces)], strict=False):
            self._ends[piece] = piece.end
            if after is not None and (after.file, after.begin) == (piece.file, piece.end):
                self._ends[piece] = self._ends[after]
        self._at: tuple[int, int] | None = None
        self._records: Iterator[Record] = iter(())
        self._next: Record | None = None

    def records(self, piece: Piece) -> Iterator[Record]:
        if self._at != (piece.file, piece.begin):
            self._records, self._next = self._read(piece.file, piece.begin, self._ends[piece]), None
        self._at = (piece.file, piece.end)
        while (record := self._next or next(self._records, None)) is not None:
            self._next = None
            if record.offset >= piece.end:
                self._next = record
                return
            yield record


def read(
    kind: str, path: str, begin: int, end: int, *, name: str, wanted: tuple[str, ...] = (), separator: str = ""
) -> Iterator[Record]:
    """The records of a file that begin in [begin, end), of tables with the fields that are wanted (all where none).

    name: the split of tfds; separator: of csv, "" for the one by which its header names the wanted fields
    """
    if kind == "csv":
        return csv_reader.read_csv(path, begin, end, wanted, separator)
    return KINDS[kind].read(f"{path}\n{name}" if kind == "tfds" else path, begin, end, wanted)


def unit(kind: str) -> str:
    """What offsets of this kind count: "byte" or "record"."""
    return KINDS[kind].unit


def _names(source: Source, place: str) -> list[str]:
    names: list[str] = []
    for part in patterns.parts(source.path):
        found = patterns.expand(part, inside=lambda folder: _inside(source.kind, folder, place)) or _shipped(part)
        if not found:
            reason = "no file has a name like this" if patterns.is_pattern(part) else "no such file"
            raise MissingSource(f"{place.removesuffix(source.path)}{part}: {reason}")
        names += found
    return list(dict.fromkeys(names))


def _shipped(path: str) -> list[str]:
    """The text that comes with the program, for its path in a checkout or an installation that is elsewhere now."""
    _, named, name = path.rpartition("configs/data/")
    here = _SHIPPED / name
    return [str(here)] if named and ".." not in name and here.is_file() else []


_TEXT_NAMES = ("", ".gz", ".zst", ".bz2", ".xz")
_NAMES = {
    "text": (".txt", ".md", ".tar", ".tgz"),
    "lines": (".txt",),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}


def _inside(kind: str, folder: str, where: str) -> list[str]:
    """The files of a folder that are named as this kind is, without those whose path holds a hidden name."""
    if kind == "arrow" and (saved := table_readers.arrow_files(folder, where)) is not None:
        return saved
    endings = _NAMES[kind] if unit(kind) == "record" else tuple(a + b for a in _NAMES[kind] for b in _TEXT_NAMES)
    found = [
        paths.join(folder, *name.split("/"))
        for name in sorted(paths.tree_files(folder))
        if name.lower().endswith(endings) and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    if not found:
        usual = ", ".join(f"*{name}" for name in _NAMES[kind])
        raise MissingSource(f"{where}: is a folder without a file named {usual}; give {paths.join(folder, '*')}")
    return found


def _measured(kind: str, names: list[str], folder: pathlib.Path | None, share: memory.Share | None) -> list[SourceFile]:
    """The files. A compressed one is read through, unless the cache remembers how long it is."""

    def read(index: int) -> list[Any]:
        file = _file(kind, names[index])
        return [file.measure, file.size, file.starts]

    try:
        states = [memory.state(name) for name in names]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    remote = any(paths.is_remote(name) for name in names)
    found = memory.facts(
        "files",
        kind,
        states,
        read,
        costs=[state[1] for state in states],
        folder=folder,
        share=share if share is not None and any(_is_packed(kind, name) for name in names) else None,
        keep=lambda found: remote or any(starts == [0] for _, _, starts in found),
    )
    return [
        SourceFile(name, measure, size, None if starts is None else tuple(starts))
        for name, (measure, size, starts) in zip(names, found, strict=True)
    ]


def _is_packed(kind: str, path: str) -> bool:
    try:
        return unit(kind) == "byte" and bool(content.compression(path))
    except OSError:  # said where it is read
        return False


def _file(kind: str, path: str) -> SourceFile:
    try:
        if not paths.size(path):
            return SourceFile(path, 0, 0)
        if kind == "parquet":
            return table_readers.parquet_file(path)
        if kind == "arrow":
            return table_readers.arrow_file(path)
        packed = bool(content.compression(path))
        size = content.length(path)
        sequential = content.is_tar(path) if kind == "text" else packed
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return SourceFile(path, size, size, (0,) if sequential else None)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to read records, whether offsets count bytes or records, and whether plain files may be cut anywhere."""

    read: Reader
    unit: str
    divisible: bool


def _no_reader(path: str, begin: int, end: int, wanted: tuple[str, ...]) -> Iterator[Record]:
    raise UserError(f"seqio:{path} is read by data/write/tasks.py")


KINDS = {
    "text": Kind(text_readers.read_text, "byte", False),
    "lines": Kind(text_readers.read_lines, "byte", True),
    "jsonl": Kind(text_readers.read_jsonl, "byte", True),
    "csv": Kind(csv_reader.read_csv, "byte", False),
    "parquet": Kind(table_readers.read_parquet, "record", True),
    "arrow": Kind(table_readers.read_arrow, "record", True),
    "tfds": Kind(tfds_reader.read_tfds, "record", True),
    "seqio": Kind(_no_reader, "record", True),
}
