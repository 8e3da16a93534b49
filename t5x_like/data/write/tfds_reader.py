"""Reader of ArrayRecord data sets of TFDS, on a disk or in a bucket: offsets are the record numbers of a split.

The library reads from a disk. Of a data set in a bucket its settings are copied to a temporary folder, and of the files
with records one at a time, which is removed when it is read: a process takes the disk of one file, 16 GiB at most.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_like.core.errors import UserError
from t5x_like.data.write.records import MissingSource, Record, SourceFile, first_line
from t5x_like.storage import paths

_MOST_STAGED = 16 << 30  # bytes of disk for one file of a bucket, and for all settings of a data set
_AT_ONCE = 256  # records
_RECORDS = "array_record"  # in the name of a file with records
_OF_MANY = re.compile(r"-\d+-of-\d+")  # in the name of a file with records, whatever its format


def tfds_file(folder: str, split: str, *, where: str) -> SourceFile:
    """The folder as one file: the records of the split, and the bytes of its files. UserError if it is no data set."""
    if not paths.is_directory(folder):
        raise MissingSource(f"{where}: no such folder")
    named = f"-{split.partition('[')[0]}."
    size = sum(size for name, size in names(folder).items() if _RECORDS in name and named in name)
    with _settings(folder) as place:
        builder = _builder(place, split, folder)
        if paths.is_remote(folder):
            counts = [part.take for part in _files(builder, split, folder)]
        else:
            counts = [len(_data(builder, split, folder))]
    if not sum(counts):
        raise UserError(f"{where}: the split is empty")
    starts = tuple(sum(counts[:index]) for index in range(len(counts))) if paths.is_remote(folder) else None
    return SourceFile(folder, sum(counts), size, starts)


def names(folder: str) -> dict[str, int]:
    """The files of a data set, by name with their sizes, those in further folders left out."""
    return {name: size for name, size in paths.tree_files(folder).items() if "/" not in name}


def read_tfds(path: str, begin: int, end: int, wanted: tuple[str, ...] = ()) -> Iterator[Record]:
    """`path`: the folder and the split, on two lines."""
    folder, split = path.split("\n")
    with _settings(folder) as place:
        builder = _builder(place, split, folder)
        if not paths.is_remote(folder):
            yield from _read(_data(builder, split, folder), begin, end, path)
            return
        first = 0
        for part in _files(builder, split, folder):
            low, high = max(begin, first), min(end, first + part.take)
            if low < high:
                name = os.path.basename(part.filename)
                with _copied(paths.join(folder, name), os.path.join(place, name)):
                    data = _data(builder, split, folder)
                    with data.data_source:  # closes its files
                        yield from _read(data, low, high, path)
            first += part.take


def _read(data: Any, begin: int, end: int, path: str) -> Iterator[Record]:
    for first in range(begin, end, _AT_ONCE):
        chunk = range(first, min(first + _AT_ONCE, end))
        try:
            examples = data.__getitems__(list(chunk))
        except Exception as error:  # a damaged file: many kinds of error
            where = f"tfds:{path.replace(chr(10), ':')}: records {first} to {chunk[-1]}"
            raise UserError(f"{where} cannot be read ({first_line(error)}); copy or write the files again") from None
        for index, fields in zip(chunk, examples, strict=True):
            yield Record(index, {name: _plain(value) for name, value in fields.items()})


def _plain(value: Any) -> Any:
    """Text as such; bytes that are none stay, in case that nobody wants them. A number of numpy becomes one."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufSUO":
        return value.tolist()
    return value


@contextlib.contextmanager
def _settings(folder: str) -> Iterator[str]:
    """A folder with the settings of a data set: its own, or a temporary one for one in a bucket."""
    if not paths.is_remote(folder):
        yield folder
        return
    found = {name: size for name, size in names(folder).items() if not _OF_MANY.search(name)}
    _check_room(folder, sum(found.values()))
    with tempfile.TemporaryDirectory(prefix="t5x_like-tfds-") as place:
        for name in found:
            paths.copy_file(paths.join(folder, name), os.path.join(place, name))
        yield place


@contextlib.contextmanager
def _copied(source: str, target: str) -> Iterator[None]:
    """Inside, the file `target` is a copy of one in a bucket."""
    try:
        _check_room(source, paths.size(source))
        paths.copy_file(source, target)
        yield
    except FileNotFoundError:
        raise UserError(f"{source}: no such file, though its data set counts it; copy the data set again") from None
    finally:
        paths.remove_tree(target)


def _check_room(path: str, size: int) -> None:
    if size > _MOST_STAGED:
        raise UserError(
            f"{path}: takes {size} bytes of disk, more than {_MOST_STAGED}; write the data set in more files, or copy "
            f"it to a disk (gcloud storage cp -r)"
        )


def _builder(place: str, split: str, folder: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError("tfds: sources need tensorflow-datasets; pip install 't5x_like[data]'") from None
    with _explained(split, folder):
        return tensorflow_datasets.builder_from_directory(place)


def _data(builder: Any, split: str, folder: str) -> Any:
    """A random-access data source over an ArrayRecord folder, which tfds reads without TensorFlow."""
    with _explained(split, folder):
        return builder.as_data_source(split)


def _files(builder: Any, split: str, folder: str) -> list[Any]:
    """Which records of which files are the split (`filename`, `take`), in its order."""
    with _explained(split, folder):
        builder.as_data_source(split)  # refuses other formats; opens no file
        return list(builder.info.splits[split].file_instructions)


@contextlib.contextmanager
def _explained(split: str, folder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tfds raises many kinds for a wrong folder, split or format
        reason = first_line(error)
        raise UserError(f"tfds:{folder}:{split}: not readable as an ArrayRecord data set ({reason})") from None
