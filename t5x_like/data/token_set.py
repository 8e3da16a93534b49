"""A token set open for reading: the tokens of all documents of one source, as data/token_shards.py has written them.

Reading goes through `os.preadv`: a memory map of a truncated file would end the process. Which files are open is
data/open_files.py, and which rows are read data/read/packing.py.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from t5x_like.core.errors import UserError
from t5x_like.data.open_files import OpenFile, OpenFiles
from t5x_like.data.token_shards import COLUMNS, INDEX, LARGE, VERSION, sections_of

_VERSIONS = (VERSION, VERSION + 1, VERSION + 2)
_READ_AT_ONCE = 1 << 20  # tokens, where many are only counted
_READ_AT_OPENING = ("ends", "inputs", "large_positions", "large_values")


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
            if COLUMNS[name][1] == "documents"
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
        for shard, local, row, begin, end in self._parts(starts, lengths, rows, columns):
            shard.read_into(tokens[row, begin:end], counts[row, begin:end], local)
        values = counts.astype(np.int32)
        if self._large_values.size:
            places = np.zeros(shape, np.int64)
            for start, length, row, column in zip(starts, lengths, rows, columns, strict=True):
                places[row, column : column + length] = np.arange(start, start + length)
            large = counts == LARGE
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
        for shard, local, row, begin, end in self._parts(starts, lengths, rows, columns):
            marks[row, begin:end] = shard.column("trained", local, end - begin)
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

    def _parts(self, *spans: np.ndarray) -> Iterator[tuple["_Shard", int, int, int, int]]:
        """(shard, first token in it, row, begin and end in the row) of the parts of spans that lie in one shard each.

        spans: starts, lengths, rows and columns, as of `read`."""
        first = np.searchsorted(self._first_token, spans[0], side="right") - 1
        for start, length, row, column, shard in zip(*(array.tolist() for array in (*spans, first)), strict=True):
            done = 0
            while done < length:
                local = start + done - int(self._first_token[shard])
                count = min(length - done, self._shards[shard].tokens - local)
                if count:
                    yield self._shards[shard], local, row, column + done, column + done + count
                done, shard = done + count, shard + 1


class _Shard:
    """One shard file, opened when it is read; all reads name it when they fail."""

    def __init__(self, folder: pathlib.Path, facts: dict[str, Any], kind: np.dtype, files: OpenFiles, *, verify: bool):
        self.path, self._files = str(folder / facts["file"]), files
        self.tokens, self.documents = facts["tokens"], facts["documents"]
        self._sections: dict[str, tuple[int, np.dtype, int]] = {}
        position = 0
        for name, section_type, per in sections_of(facts.get("columns", ())):
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
