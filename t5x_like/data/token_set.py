"""A token set: the tokens of all documents of one source, on disk, and how they are written and read.

A folder of shards. A shard is one file of sections (tokens, bytes per token, document ends, ...) and a JSON beside it
that is written last and holds sizes and checksum; `index.json` is written when all shards are there. Reading goes
through `os.preadv`: a memory map of a truncated file would end the process. Which files are open is data/open_files.py,
and which rows are read data/read/packing.py.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Int

from t5x_like.core.errors import UserError
from t5x_like.data.open_files import OpenFile, OpenFiles
from t5x_like.storage import paths

VERSION = 1  # of sets without columns, 2 of sets with them, 3 where one of them has an entry per token
_VERSIONS = (VERSION, VERSION + 1, VERSION + 2)
INDEX = "index.json"
_READ_AT_ONCE = 1 << 20  # tokens, where many are only counted
_IN_MEMORY = 4 << 20  # bytes of a section that is being written
_LARGE = 255  # in the section `bytes`: the value is in the list of large ones
_READ_AT_OPENING = ("ends", "inputs", "large_positions", "large_values")
_SECTIONS = (  # (name, numpy type or None for the tokens' own, entries per)
    ("tokens", None, "tokens"),
    ("bytes", "<u1", "tokens"),
    ("ends", "<i8", "documents"),
    ("files", "<i4", "documents"),
    ("offsets", "<i8", "documents"),
    ("inputs", "<i4", "documents"),
    ("large_positions", "<i8", "large"),
    ("large_values", "<i8", "large"),
)
# Sections that some sets have besides: (numpy type, entries per).
_COLUMNS = {"rejected": ("<i4", "documents"), "labels": ("<i4", "documents"), "trained": ("<u1", "tokens")}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Documents one after the other. All arrays but the first two have one entry per document.

    ids, byte_counts: all tokens, with BOS and EOS; inputs: tokens at its begin without loss; files, offsets: its place
    columns: what some kinds of documents have besides: {"rejected": the token in it with which the second answer
    begins} of a pair (prompt, chosen answer, rejected answer), {"labels": its class}, {"trained": of every token, 1 if
    it is predicted with loss} of a conversation
    """

    ids: Int[np.ndarray, "tokens"]
    byte_counts: Int[np.ndarray, "tokens"]
    lengths: Int[np.ndarray, "documents"]
    inputs: Int[np.ndarray, "documents"]
    files: Int[np.ndarray, "documents"]
    offsets: Int[np.ndarray, "documents"]
    skipped: int  # documents without a token
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def token_type(vocabulary_size: int) -> str:
    return "<u2" if vocabulary_size <= 1 << 16 else "<u4"


def shard_name(index: int) -> str:
    return f"shard-{index:05d}"


def _sections(columns: Sequence[str]) -> tuple[tuple[str, str | None, str], ...]:
    return (*_SECTIONS, *((name, *_COLUMNS[name]) for name in columns))


def write_shard(
    folder: pathlib.Path,
    index: int,
    batches: Iterable[Encoded],
    kind: str,
    *,
    columns: Sequence[str] = (),
    notes: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Writes shard number `index`, tokens of numpy type `kind`; returns and stores what its JSON says.

    notes: more facts for that JSON, asked for after the last batch
    """
    data = folder / f"{shard_name(index)}.bin"
    digest, written = hashlib.sha256(), 0
    tokens = skipped = text_bytes = 0
    with contextlib.ExitStack() as held:
        file = held.enter_context(_whole(data))
        sections = {name: held.enter_context(_Section(folder, str(entry))) for name, entry, _ in _sections(columns)[1:]}
        for batch in batches:
            written += _append(file, digest, batch.ids.astype(kind))
            large = np.flatnonzero(batch.byte_counts >= _LARGE)
            sections["bytes"].append(np.minimum(batch.byte_counts, _LARGE))
            sections["ends"].append(tokens + np.cumsum(batch.lengths))
            sections["large_positions"].append(tokens + large)
            sections["large_values"].append(batch.byte_counts[large])
            for name in ("files", "offsets", "inputs"):
                sections[name].append(getattr(batch, name))
            for name in columns:
                sections[name].append(batch.columns[name])
            tokens += len(batch.ids)
            skipped += batch.skipped
            text_bytes += int(batch.byte_counts.sum())
        for section in sections.values():
            for block in section.blocks():
                written += _append(file, digest, block)
    facts = {
        "file": data.name,
        "tokens": tokens,
        "documents": sections["ends"].entries,
        "large": sections["large_values"].entries,
        "text_bytes": text_bytes,
        "skipped": skipped,
        "size": written,
        "sha256": digest.hexdigest(),
    } | ({"columns": list(columns)} if columns else {})
    facts |= notes()
    with _whole(folder / f"{shard_name(index)}.json") as file:
        file.write(paths.json_text(facts).encode())
    return facts


class _Section:
    """A section that grows while the tokens are written before it: in memory while small, else in a file beside it."""

    def __init__(self, folder: pathlib.Path, kind: str):
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(folder))
        self._kind, self.entries = kind, 0

    def append(self, array: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(array.astype(self._kind)).data.cast("B") if array.size else b"")
        self.entries += len(array)

    def blocks(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        while block := self._file.read(_IN_MEMORY):
            yield np.frombuffer(block, np.uint8)

    def __enter__(self) -> "_Section":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the body ends well; the lock on it says that its writer lives."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.writing")
    try:
        with paths.writing(str(path)), open(temporary, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _append(file: Any, digest: Any, array: np.ndarray) -> int:
    content = np.ascontiguousarray(array).data.cast("B") if array.size else b""
    digest.update(content)
    file.write(content)
    return array.nbytes


def shard_facts(folder: pathlib.Path, index: int) -> dict[str, Any] | None:
    """What the JSON of a finished shard says; None when it is not finished (or its file has another size)."""
    try:
        facts = json.loads((folder / f"{shard_name(index)}.json").read_text())
        return facts if (folder / facts["file"]).stat().st_size == facts["size"] else None
    except (OSError, ValueError, KeyError):
        return None


def write_index(
    folder: pathlib.Path,
    *,
    fingerprint: str,
    kind: str,
    unit: str,
    shards: list[dict[str, Any]],
    notes: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
    """Declares a token set complete. `unit`: what document offsets count, "byte" or "record"; notes: more facts."""
    total = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "text_bytes", "skipped")}
    columns = {"columns": shards[0]["columns"]} if shards and "columns" in shards[0] else {}
    per_token = any(_COLUMNS[name][1] == "tokens" for name in columns.get("columns", ()))
    version = VERSION + 2 if per_token else VERSION + 1 if columns else VERSION
    index = {"version": version, **columns, "fingerprint": fingerprint, "token_type": kind, "unit": unit, **total}
    paths.write_json_if_other(str(folder / INDEX), index | dict(notes) | {"shards": shards})


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what writers that have died left behind: the files that nobody holds locked."""
    for path in folder.glob(".shard-*.writing"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class TokenSet:
    """A complete token set, open for reading. `documents`, `tokens`, `text_bytes`, `skipped`, `bad`: totals.

    `ends`, `inputs` and `columns` have one entry per document. `marks_trained`: whether it says of every token if it is
    trained; else all behind the inputs are.

    Sizes are checked when it is opened, checksums too with `verify`. Reading is safe from several threads. `files`
    may be those of several sets.
    """

    def __init__(self, folder: pathlib.Path, *, verify: bool, files: OpenFiles):
        self.folder, self._files = folder, files
        index = read_index(folder)
        self.fingerprint: str = index["fingerprint"]
        self.unit: str = index["unit"]
        self.tokens: int = index["tokens"]
        self.documents: int = index["documents"]
        self.text_bytes: int = index["text_bytes"]
        self.skipped: int = index["skipped"]
        self.bad: int = index.get("bad", {}).get("count", 0)
        self.empty_files: int = index.get("empty_files", 0)
        self._type = np.dtype(index["token_type"])
        self._shards = [_Shard(folder, facts, self._type, files, verify=verify) for facts in index["shards"]]
        counts = np.array([[shard.tokens, shard.documents] for shard in self._shards], np.int64).reshape(-1, 2)
        self._first_token = np.concatenate([[0], np.cumsum(counts[:, 0])])
        self._first_document = np.concatenate([[0], np.cumsum(counts[:, 1])])
        columns = [{name: shard.column(name, 0, None) for name in _READ_AT_OPENING} for shard in self._shards]
        for first, column in zip(self._first_token.tolist(), columns, strict=False):
            column["ends"] += first
            column["large_positions"] += first
        empty = np.zeros(0, np.int64)
        joined = {name: np.concatenate([empty, *(column[name] for column in columns)]) for name in _READ_AT_OPENING}
        self.ends: np.ndarray = joined["ends"]  # the token behind each document
        self.inputs: np.ndarray | None = joined["inputs"].astype(np.int32) if joined["inputs"].any() else None
        listed = index.get("columns", ())
        self.columns = {
            name: np.concatenate([empty, *(shard.column(name, 0, None) for shard in self._shards)])
            for name in listed
            if _COLUMNS[name][1] == "documents"
        }
        self.marks_trained = "trained" in listed
        self._large_positions, self._large_values = joined["large_positions"], joined["large_values"]

    def read(
        self,
        starts: Int[np.ndarray, "spans"],
        lengths: Int[np.ndarray, "spans"],
        rows: Int[np.ndarray, "spans"],
        columns: Int[np.ndarray, "spans"],
        shape: tuple[int, int],
    ) -> tuple[Int[np.ndarray, "n width"], Int[np.ndarray, "n width"]]:
        """(tokens, bytes they stand for): tokens [start, start + length) at (row, column) and on; zeros elsewhere."""
        tokens, counts = np.zeros(shape, self._type), np.zeros(shape, np.uint8)
        spans = (starts, lengths, rows, columns, self._shard_of(starts))
        for start, length, row, column, shard in zip(*(array.tolist() for array in spans), strict=True):
            end = column + length
            self._read_span(tokens[row, column:end], counts[row, column:end], start, shard)
        values = counts.astype(np.int32)
        if self._large_values.size:
            places = np.zeros(shape, np.int64)
            for start, length, row, column in zip(starts, lengths, rows, columns, strict=True):
                places[row, column : column + length] = np.arange(start, start + length)
            large = counts == _LARGE
            values[large] = self._large_values[np.searchsorted(self._large_positions, places[large])]
        return tokens.astype(np.int32), values

    def read_trained(
        self,
        starts: Int[np.ndarray, "spans"],
        lengths: Int[np.ndarray, "spans"],
        rows: Int[np.ndarray, "spans"],
        columns: Int[np.ndarray, "spans"],
        shape: tuple[int, int],
    ) -> Bool[np.ndarray, "n width"]:
        """Of the same tokens as `read`, which are predicted with loss."""
        marks = np.zeros(shape, np.uint8)
        spans = (starts, lengths, rows, columns, self._shard_of(starts))
        for start, length, row, column, shard in zip(*(array.tolist() for array in spans), strict=True):
            for local, begin, end, number in self._within(start, length, shard):
                found = self._shards[number].column("trained", local, end - begin)
                marks[row, column + begin : column + end] = found
        return marks > 0

    def begin(self, document: int) -> int:
        """The number of a document's first token."""
        return int(self.ends[document - 1]) if document else 0

    def text_bytes_before(self, document: int, token: int) -> int:
        """Bytes of its text that the first `token` tokens of a document stand for."""
        begin, total = self.begin(document), 0
        for start in range(begin, begin + token, _READ_AT_ONCE):
            count = min(_READ_AT_ONCE, begin + token - start)
            _, counts = self.read(np.array([start]), np.array([count]), np.array([0]), np.array([0]), (1, count))
            total += int(counts.sum())
        return total

    def place(self, document: int) -> tuple[int, int]:
        """(number of the source file, offset in it) of a document."""
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        local = document - int(self._first_document[shard])
        found = (self._shards[shard].column(name, local, 1)[0] for name in ("files", "offsets"))
        file, offset = (int(value) for value in found)
        return file, offset

    def close(self) -> None:
        self._files.close(shard.path for shard in self._shards)

    def _shard_of(self, tokens: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_token, tokens, side="right") - 1

    def _read_span(self, tokens: np.ndarray, counts: np.ndarray, start: int, shard: int) -> None:
        for local, begin, end, number in self._within(start, len(tokens), shard):
            self._shards[number].read_into(tokens[begin:end], counts[begin:end], local)

    def _within(self, start: int, length: int, shard: int) -> Iterator[tuple[int, int, int, int]]:
        """(first token within its shard, begin and end within the span, shard) of the parts of a span of tokens."""
        done = 0
        while done < length:
            local = start + done - int(self._first_token[shard])
            count = min(length - done, self._shards[shard].tokens - local)
            if count:
                yield local, done, done + count, shard
            done, shard = done + count, shard + 1


class _Shard:
    """One shard file, opened when it is read; all reads name it when they fail."""

    def __init__(self, folder: pathlib.Path, facts: dict[str, Any], kind: np.dtype, files: OpenFiles, *, verify: bool):
        self.path, self._files = str(folder / facts["file"]), files
        self.tokens, self.documents = facts["tokens"], facts["documents"]
        self._sections: dict[str, tuple[int, np.dtype, int]] = {}
        position = 0
        for name, section_type, per in _sections(facts.get("columns", ())):
            entry = np.dtype(section_type or kind)
            self._sections[name] = (position, entry, facts[per])
            position += entry.itemsize * facts[per]
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if size != facts["size"] or position != size:
            raise UserError(f"{self.path}: has {size} bytes, its index says {facts['size']}; {_REMEDY}")
        if verify and self._checksum() != facts["sha256"]:
            raise UserError(f"{self.path}: its sha256 is not the one in its index; {_REMEDY}")

    def read_into(self, tokens: np.ndarray, counts: np.ndarray, local: int) -> None:
        file = self._open()
        self._fill(file, tokens, self._sections["tokens"][0] + local * tokens.itemsize)
        self._fill(file, counts, self._sections["bytes"][0] + local)

    def column(self, name: str, first: int, count: int | None) -> np.ndarray:
        position, entry, entries = self._sections[name]
        column = np.empty(entries if count is None else count, entry)
        self._fill(self._open(), column, position + first * entry.itemsize)
        return column

    def _open(self) -> OpenFile:
        try:
            return self._files.get(self.path)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _fill(self, file: OpenFile, out: np.ndarray, position: int) -> None:
        """Reads exactly the bytes of `out`; the kernel may give fewer at a time."""
        rest: Any = out
        while (count := self._read(file, rest, position)) < rest.nbytes:
            if count == 0:
                raise UserError(f"{self.path}: ends at byte {position}, within its data; {_REMEDY}")
            rest, position = memoryview(rest).cast("B")[count:], position + count

    def _read(self, file: OpenFile, out: Any, position: int) -> int:
        try:
            return os.preadv(file.descriptor, [out], position)
        except OSError as error:
            raise UserError(f"{self.path}: reading at byte {position}: {error.strerror}") from None

    def _checksum(self) -> str:
        digest, buffer, position = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
        file = self._open()
        while count := self._read(file, buffer, position):
            digest.update(buffer[:count])
            position += count
        return digest.hexdigest()


def _unreadable(path: str, error: OSError) -> UserError:
    """Only a lost file is mended by another one: it may also be that this process may not open it."""
    return UserError(f"{path}: {error.strerror}" + (f"; {_REMEDY}" if isinstance(error, FileNotFoundError) else ""))


_REMEDY = "delete this file and run `t5x_like prepare` again (other shards are kept)"


def read_index(folder: pathlib.Path) -> dict[str, Any]:
    """The JSON that declares a token set complete."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{path}: not the index of a token set ({error}); delete {folder} and prepare again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if index.get("version") not in _VERSIONS:
        raise UserError(
            f"{path}: version {index.get('version')} instead of {VERSION}; delete {folder} and prepare again"
        )
    return index
