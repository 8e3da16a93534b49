"""The files of a token set, the tokens of all documents of one source, and how they are written.

A folder of shards. A shard is one file of sections (tokens, bytes per token, document ends, ...) and a JSON beside it
that is written last and holds sizes and checksum; `index.json` is written when all shards are there. Reading:
data/token_set.py.
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
from jaxtyping import Int

from t5x_like.storage import paths

VERSION = 1  # of sets without columns, 2 of sets with them, 3 where one of them has an entry per token
INDEX = "index.json"
_IN_MEMORY = 4 << 20  # bytes of a section that is being written
LARGE = 255  # in the section `bytes`: the value is in the list of large ones
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
COLUMNS = {"rejected": ("<i4", "documents"), "labels": ("<i4", "documents"), "trained": ("<u1", "tokens")}


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


def sections_of(columns: Sequence[str]) -> tuple[tuple[str, str | None, str], ...]:
    """(name, numpy type or None for the tokens' own, entries per) of a shard with these columns, in their order."""
    return (*_SECTIONS, *((name, *COLUMNS[name]) for name in columns))


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
        sections = {
            name: held.enter_context(_Section(folder, str(entry))) for name, entry, _ in sections_of(columns)[1:]
        }
        for batch in batches:
            written += _append(file, digest, batch.ids.astype(kind))
            large = np.flatnonzero(batch.byte_counts >= LARGE)
            sections["bytes"].append(np.minimum(batch.byte_counts, LARGE))
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
    per_token = any(COLUMNS[name][1] == "tokens" for name in columns.get("columns", ()))
    version = VERSION + 2 if per_token else VERSION + 1 if columns else VERSION
    index = {"version": version, **columns, "fingerprint": fingerprint, "token_type": kind, "unit": unit, **total}
    paths.write_json_if_other(str(folder / INDEX), index | dict(notes) | {"shards": shards})


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what writers that have died left behind: the files that nobody holds locked."""
    for path in folder.glob(".shard-*.writing"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
