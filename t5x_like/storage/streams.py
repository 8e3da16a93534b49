"""Leaves of a checkpoint a piece at a time, for models larger than memory: reading any, writing new ones.

What is written is the layout that Orbax reads, without its OCDBT database: for each array a folder with a `.zarray` and
a file for each chunk, uncompressed, beside `_METADATA`, which names the leaves. Orbax's own writer takes whole arrays.
The note with config and fingerprints is the same as that of storage/checkpoint.py.
"""

import contextlib
import ctypes
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns the names of bfloat16 and its kin)
import numpy as np
import tensorstore as ts

from t5x_like.core.errors import UserError
from t5x_like.storage import paths
from t5x_like.storage.model_directory import COMMITTED, METADATA, DamagedCheckpoint, read_metadata

# One half-open interval (begin, end) for each dim of an array.
Region = tuple[tuple[int, int], ...]

_MMAP_THRESHOLD = -3  # the parameter of mallopt(3)
_ORBAX = "orbax.checkpoint._src.handlers"
_HANDLERS = {
    "array": f"{_ORBAX}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "json": f"{_ORBAX}.json_checkpoint_handler.JsonCheckpointHandler",
}


class LeafReader:
    """One array of an item that a checkpoint holds, as Orbax or ItemWriter wrote it.

    chunk: the shape of the pieces it was stored in; reading a region holds those that it touches.
    """

    def __init__(self, item: str, path: str, record: Mapping[str, Any], *, database: bool):
        self.shape, self.dtype = tuple(record["shape"]), np.dtype(record["dtype"])
        self._where = f"{item}: {path!r}"
        name = path.replace("/", ".")
        kvstore: dict[str, Any] = _files(item) if database else _files(paths.join(item, name))
        if database:
            kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{name}/"}
        try:
            self._store = ts.open(
                {"driver": "zarr", "kvstore": kvstore}, open=True, read=True, context=_context()
            ).result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from None
        if self._store.shape != self.shape or self._store.dtype.numpy_dtype != self.dtype:
            raise self._damaged(f"{self._store.shape} {self._store.dtype.name} differs from its metadata")
        self.chunk = tuple(int(size or 1) for size in self._store.chunk_layout.read_chunk.shape or ())

    def read(self, region: Region) -> np.ndarray:
        try:
            return np.asarray(self._store[tuple(slice(*span) for span in region)].read().result())
        except (ValueError, OSError) as error:
            raise self._damaged(error) from None

    def read_into(self, array: np.ndarray, region: Region) -> None:
        """As `read`, into an array of the region's shape and this leaf's dtype."""
        try:
            ts.array(array, copy=False).write(
                self._store[tuple(slice(*span) for span in region)].translate_to[0]
            ).result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, reason: Any) -> DamagedCheckpoint:
        line = " ".join(str(reason).partition("[source locations=")[0].split())[:200]
        return DamagedCheckpoint(f"{self._where} cannot be read ({line})")


def read_item(checkpoint: str, name: str) -> dict[str, LeafReader]:
    """The leaves of one item of a checkpoint by path; nothing is read but their descriptions."""
    recorded = read_metadata(checkpoint)["arrays"].get(name)
    if recorded is None:
        raise UserError(f"{checkpoint} holds no {name!r}")
    item = paths.join(checkpoint, name)
    database = paths.exists(paths.join(item, "manifest.ocdbt"))
    return {path: LeafReader(item, path, record, database=database) for path, record in recorded.items()}


class LeafWriter:
    """One array of a new item; its chunks may be written from several threads."""

    def __init__(self, folder: str, shape: Sequence[int], dtype: np.dtype, chunk: Sequence[int]):
        self.shape, self.dtype, self.chunk = tuple(shape), np.dtype(dtype), tuple(chunk)
        self._store = ts.open(
            {
                "driver": "zarr",
                "kvstore": _files(folder),
                "metadata": {"shape": list(shape), "chunks": list(chunk), "compressor": None},
                "dtype": self.dtype.name,
            },
            create=True,
            context=_context(),
        ).result()

    def write(self, region: Region, array: np.ndarray) -> None:
        """`array` for a region that is one chunk, or several whole ones."""
        try:
            self._store[tuple(slice(*span) for span in region)].write(array).result()
        except (ValueError, OSError) as error:
            line = " ".join(str(error).partition("[source locations=")[0].split())[-200:]
            raise UserError(f"a chunk of a new checkpoint cannot be written ({line}); free disk space") from None


class ItemWriter:
    """A new item in a folder: leaves by path, described as Orbax describes a nested dict of arrays."""

    def __init__(self, folder: str, leaves: Mapping[str, tuple[Sequence[int], Any, Sequence[int]]]):
        """`leaves`: path -> (shape, dtype, shape of a chunk)."""
        self.leaves = {
            path: LeafWriter(paths.join(folder, path.replace("/", ".")), *described)
            for path, described in leaves.items()
        }
        entries = {}
        for path, leaf in self.leaves.items():
            keys = tuple(path.split("/"))
            entries[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(leaf.shape),
                },
            }
        description = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        paths.write_text_atomic(paths.join(folder, "_METADATA"), json.dumps(description))


def write_note(checkpoint: str, note: Mapping[str, Any]) -> None:
    """Completes a checkpoint whose items are written: its metadata, and the files that tell Orbax what each item is and
    that all are there, which counts once the checkpoint is copied into a bucket."""
    if not paths.is_remote(checkpoint):
        _sync(checkpoint)
    folder = paths.join(checkpoint, METADATA)
    paths.write_text_atomic(paths.join(folder, METADATA), json.dumps(note))
    handlers = {name: _HANDLERS["array"] for name in note["arrays"]} | {METADATA: _HANDLERS["json"]}
    now = int(note["time"] * 1e9)
    content = {
        "item_handlers": handlers,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    paths.write_text_atomic(paths.join(checkpoint, "_CHECKPOINT_METADATA"), json.dumps(content))
    paths.write_text_atomic(paths.join(checkpoint, COMMITTED), "")


def chunks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Region]:
    """The regions of a grid of chunks, the last ones cut at the end of the array.

    >>> list(chunks((3, 2), (2, 2)))
    [((0, 2), (0, 2)), ((2, 3), (0, 2))]
    """
    spans = [
        [(begin, min(begin + step, size)) for begin in range(0, size, step)]
        for size, step in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*spans)


def size(region: Region) -> int:
    """The number of elements in a region."""
    return math.prod(end - begin for begin, end in region)


def require_space(folder: str, wanted: int) -> None:
    """Raises UserError unless the disk of a local folder has so many bytes free."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free of the {wanted / 1e9:.1f} GB that are needed")


def free_pieces_at_once() -> None:
    """Tells glibc to map every large array by itself, so that it is given back when it is freed.

    Else its threshold grows to 32 MB with the first ones freed, and pieces leave holes in the heap of each thread:
    430 MB instead of 85 after a gigabyte. The price is page faults, a third of the time of a conversion.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def _files(folder: str) -> dict[str, Any]:
    if not paths.is_remote(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, path = folder.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def _context() -> ts.Context:
    """No cache: a piece that is read is held once. No fsync of each chunk: write_note syncs all of them at the end."""
    return ts.Context(
        {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 2}, "file_io_sync": False}
    )


def _sync(folder: str) -> None:
    """Puts every file below a local folder onto the disk."""
    for name in paths.tree_files(folder):
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
