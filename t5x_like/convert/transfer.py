"""Moves a model between a foreign source and a checkpoint of ours, one piece of one leaf at a time.

A piece is at most BLOCK_BYTES (mapping.py), or one chunk of a checkpoint that a run has written. Each of the few
threads holds one piece about four times: as read, in the other order, in the other dtype, and on its way to the disk.
That is the bound on memory, whatever the size of the model.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from t5x_like.convert import scratch
from t5x_like.convert.compressed_tensors import Packing
from t5x_like.convert.mapping import ModelMap, Reading, Target, all_finite
from t5x_like.core.errors import UserError
from t5x_like.storage import fingerprint
from t5x_like.storage.model_directory import DamagedCheckpoint
from t5x_like.storage.streams import ItemWriter, LeafReader, Region, chunks, free_pieces_at_once

# What becomes of a piece on its way: (path, region, piece, dtype that is wanted) -> piece, in that or a finer type.
Change = Callable[[str, Region, np.ndarray, np.dtype], np.ndarray]
THREADS = 2
_ONE, _Result = TypeVar("_ONE"), TypeVar("_Result")


def to_native(reading: Reading, mapping: ModelMap, item: str, *, dtype: str | None) -> dict[str, dict[str, Any]]:
    """Writes every leaf into a new item. Returns {"arrays": path -> {shape, dtype}, "fingerprints": path -> number}.

    dtype: what all leaves become; None: what they are.
    """
    dtypes = {path: np.dtype(dtype) if dtype else found for path, found in reading.dtypes.items()}
    shapes = {path: leaf.shape for path, leaf in mapping.leaves.items()}
    writer = ItemWriter(
        item,
        {path: (shapes[path], dtypes[path], mapping.chunk(path, dtypes[path].itemsize)) for path in sorted(shapes)},
    )

    def move(job: tuple[str, Region]) -> tuple[str, int]:
        path, region = job
        piece = reading.read(path, region).astype(dtypes[path], copy=False)
        writer.leaves[path].write(region, piece)
        return path, fingerprint.part(piece, [begin for begin, _ in region], shapes[path])

    jobs = ((path, region) for path, leaf in writer.leaves.items() for region in chunks(leaf.shape, leaf.chunk))
    sums = _add(in_threads(move, jobs), writer.leaves)
    arrays = {path: {"shape": list(shapes[path]), "dtype": dtypes[path].name} for path in writer.leaves}
    return {"arrays": arrays, "fingerprints": sums}


def from_native(
    leaves: Mapping[str, LeafReader],
    mapping: ModelMap,
    target: Target,
    *,
    dtype: str | None,
    recorded: Mapping[str, int],
    where: str,
    packing: Packing | None = None,
    change: Change | None = None,
) -> None:
    """Reads every leaf once and puts it into their tensors. Raises DamagedCheckpoint where bits are not `recorded`."""

    def write(path: str, region: Region, piece: np.ndarray) -> None:
        wanted = piece.dtype if dtype is None else np.dtype(dtype)
        new = piece if change is None else change(path, region, piece, wanted)
        if packing is not None and path in packing.dims:
            packing.write(mapping, target, path, region, new)
        else:
            mapping.write(target, path, region, new.astype(wanted, copy=False))

    chunk = None if packing is None else packing.chunk
    _read_all(leaves, write, recorded=recorded, where=where, chunk=chunk)


def between_native(
    leaves: Mapping[str, LeafReader],
    item: str,
    *,
    dtype: str | None,
    recorded: Mapping[str, int],
    where: str,
    change: Change,
) -> dict[str, dict[str, Any]]:
    """Writes the leaves of ours, changed, into a new item of ours. Returns as `to_native`."""
    types = {path: np.dtype(dtype) if dtype else leaf.dtype for path, leaf in leaves.items()}
    writer = ItemWriter(item, {path: (leaf.shape, types[path], leaf.chunk) for path, leaf in sorted(leaves.items())})
    sums = dict.fromkeys(writer.leaves, 0)
    lock = threading.Lock()

    def write(path: str, region: Region, piece: np.ndarray) -> None:
        new = change(path, region, piece, types[path]).astype(types[path], copy=False)
        writer.leaves[path].write(region, new)
        value = fingerprint.part(new, [begin for begin, _ in region], writer.leaves[path].shape)
        with lock:
            sums[path] = (sums[path] + value) % 2**32

    _read_all(leaves, write, recorded=recorded, where=where, chunk=None)
    arrays = {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in writer.leaves.items()}
    return {"arrays": arrays, "fingerprints": sums}


def write_item(item: str, given: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Writes small arrays by path as an item, each in one piece. Returns as `to_native`."""
    writer = ItemWriter(item, {path: (array.shape, array.dtype, array.shape) for path, array in given.items()})
    for path, array in given.items():
        writer.leaves[path].write(tuple((0, size) for size in array.shape), array)
    return {
        "arrays": {path: {"shape": list(array.shape), "dtype": array.dtype.name} for path, array in given.items()},
        "fingerprints": {path: fingerprint.part(array, [0] * array.ndim, array.shape) for path, array in given.items()},
    }


def _read_all(
    leaves: Mapping[str, LeafReader],
    write: Callable[[str, Region, np.ndarray], None],
    *,
    recorded: Mapping[str, int],
    where: str,
    chunk: Callable[[str, Sequence[int], Sequence[int]], Sequence[int]] | None,
) -> None:
    """Reads every leaf once, piece by piece, and hands each on as it was stored.

    chunk(path, shape, stored chunk): the pieces, where they are not those that were stored. Raises DamagedCheckpoint
    where bits are not `recorded`.
    """

    def move(job: tuple[str, Region]) -> tuple[str, int]:
        path, region = job
        leaf = leaves[path]
        piece = scratch.array("ours", [end - begin for begin, end in region], leaf.dtype)
        leaf.read_into(piece, region)
        value = fingerprint.part(piece, [begin for begin, _ in region], leaf.shape)
        if not all_finite(piece):
            raise UserError(f"{where}: {path!r} holds NaN or infinity; take an earlier checkpoint")
        write(path, region, piece)
        return path, value

    def pieces(path: str, leaf: LeafReader) -> Iterator[Region]:
        return chunks(leaf.shape, leaf.chunk if chunk is None else chunk(path, leaf.shape, leaf.chunk))

    jobs = ((path, region) for path, leaf in leaves.items() for region in pieces(path, leaf))
    sums = _add(in_threads(move, jobs), leaves)
    wrong = [path for path, value in sums.items() if value != recorded.get(path)]
    if wrong:
        raise DamagedCheckpoint(f"checkpoint {where} is damaged: params/{wrong[0]} differs from what was saved")


def in_threads(function: Callable[[_ONE], _Result], jobs: Iterable[_ONE]) -> Iterator[_Result]:
    """The results in order, with at most THREADS calls begun and not yet given out, so that few pieces are held."""
    free_pieces_at_once()
    waiting: list[Any] = []
    jobs = iter(jobs)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            while True:
                waiting += [pool.submit(function, job) for job in itertools.islice(jobs, THREADS + 1 - len(waiting))]
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _add(parts: Iterable[tuple[str, int]], names: Iterable[str]) -> dict[str, int]:
    sums = dict.fromkeys(names, 0)
    for path, value in parts:
        sums[path] = (sums[path] + value) % 2**32
    return sums
