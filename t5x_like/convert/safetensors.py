"""Safetensors files: 8 bytes with the length of a JSON header, the header, then the bytes of all tensors.

Read and written in place, a piece of a tensor at a time: the library of that name reads through a memory map and writes
from whole tensors. Whatever a header says is checked before a byte is taken at its word.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from t5x_like.convert import scratch
from t5x_like.convert.layout import Span
from t5x_like.convert.mapping import copy
from t5x_like.core.errors import UserError
from t5x_like.storage import paths

# As in the reference implementation; a header of 100 MB names more than 500,000 tensors.
_MAX_HEADER = 100_000_000
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FileTensors:
    """Tensors by name in one open file, each a row-major array somewhere in it. Read from several threads."""

    def __init__(self, path: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, int]], descriptor: int):
        """`tensors`: name -> (shape, dtype, byte at which it begins)."""
        self.where, self._tensors, self._descriptor = path, tensors, descriptor

    def described(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {name: (shape, dtype) for name, (shape, dtype, _) in self._tensors.items()}

    def read(self, name: str, span: Span, *, reuse: bool = False, dtype: Any = None) -> np.ndarray:
        """dtype: what the bytes are taken as, with a span in elements of it; None for what they are."""
        _, stored, offset = self._tensors[name]
        dtype = stored if dtype is None else np.dtype(dtype)
        starts, length = span.runs()
        array = scratch.array("theirs", span.shape, dtype) if reuse else np.empty(span.shape, dtype)
        rest = array.reshape(-1).view(np.uint8).data
        for start in starts:
            run, rest = rest[: length * dtype.itemsize], rest[length * dtype.itemsize :]
            self._fill(run, offset + int(start) * dtype.itemsize, name)
        return array

    def _fill(self, buffer: memoryview, offset: int, name: str) -> None:
        while buffer:
            count = os.preadv(self._descriptor, [buffer[: 1 << 30]], offset)
            if not count:
                raise UserError(f"{self.where} ends within {name!r}; it is truncated: copy it again")
            buffer, offset = buffer[count:], offset + count


@contextlib.contextmanager
def open_file(path: str) -> Iterator[FileTensors]:
    """The tensors of a safetensors file. Raises UserError, in one line, for one that is damaged."""
    with opened(path) as descriptor:
        total = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if total < 8 or length > min(total - 8, _MAX_HEADER):
            limit = f"at most {_MAX_HEADER:,}" if length > _MAX_HEADER else f"in a file of {total:,}"
            raise UserError(
                f"{path} is no safetensors file or is truncated: a header of {length:,} bytes {limit}; copy it again"
            )
        try:
            header = json.loads(os.pread(descriptor, length, 8))
            tensors = {
                name: _entry(value, 8 + length, total) for name, value in header.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: its header describes no tensors ({reason}); copy the file again") from None
        _check_places(path, tensors)
        yield FileTensors(path, tensors, descriptor)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A descriptor of a file that is there to be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the model is not whole") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _entry(value: Mapping[str, Any], base: int, total: int) -> tuple[tuple[int, ...], np.dtype, int]:
    shape, (begin, end) = value["shape"], value["data_offsets"]
    if value["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {value['dtype']!r}")
    dtype = _DTYPES[value["dtype"]]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a shape or an offset is no whole number")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for the shape {shape} in {value['dtype']}")
    if base + end > total:
        raise ValueError(f"a tensor ends at byte {base + end:,} of {total:,}: the file is truncated")
    return tuple(shape), dtype, base + begin


def _check_places(path: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, int]]) -> None:
    before, before_name = 0, ""
    for name, (shape, dtype, begin) in sorted(tensors.items(), key=lambda item: item[1][2]):
        size = math.prod(shape) * dtype.itemsize
        if size and begin < before:
            raise UserError(f"{path}: the bytes of {name!r} and {before_name!r} overlap; copy the file again")
        if size:
            before, before_name = begin + size, name


class Writer:
    """A new file of tensors whose names, shapes and dtypes are known; their bytes come in any order."""

    def __init__(self, path: str, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        self._path, offset = path, 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without
        self._tensors: dict[str, tuple[np.dtype, int]] = {}
        for name, (shape, dtype) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._tensors[name], offset = (dtype, offset), end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        with paths.writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.truncate(self._descriptor, self._base + offset)
            self._put(memoryview(len(text).to_bytes(8, "little") + text), 0)

    def write(self, name: str, span: Span, array: np.ndarray) -> None:
        dtype, offset = self._tensors[name]
        starts, length = span.runs()
        if not array.flags.c_contiguous:
            ordered = scratch.array("theirs", array.shape, array.dtype)
            copy(array, ordered)
            array = ordered
        rest = array.reshape(-1).view(np.uint8).data
        with paths.writing(self._path):
            for start in starts:
                run, rest = rest[: length * dtype.itemsize], rest[length * dtype.itemsize :]
                self._put(run, self._base + offset + int(start) * dtype.itemsize)

    def _put(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.pwrite(self._descriptor, buffer[: 1 << 30], offset)
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        """Everything is on the disk when it returns."""
        with paths.writing(self._path):
            os.fsync(self._descriptor)
        os.close(self._descriptor)
