"""Readers of Parquet and Arrow: offsets are record numbers, and only wanted columns are read.

Tables are read in batches of about 4 MiB, from the begin of a row group, so that memory depends neither on the size
of a file nor on that of its row groups: a row group is decoded page by page.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.write.records import Record, SourceFile, bad, first_line
from t5x_like.storage import paths

_BATCH_BYTES, _BATCH_ROWS = 4 << 20, 1 << 13
_READ_BYTES = 1 << 20


def parquet_file(path: str) -> SourceFile:
    """Rows of a Parquet file, and the row groups at which reading may begin."""
    with _parquet(path) as file:
        groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    starts = tuple(sum(groups[:index]) for index in range(len(groups)))
    return SourceFile(path, sum(groups), paths.size(path), starts)


def read_parquet(path: str, begin: int, end: int, wanted: tuple[str, ...] = ()) -> Iterator[Record]:
    with _parquet(path) as file:
        columns, others = _columns(file.schema_arrow, wanted)
        first = 0
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            if first < end and first + facts.num_rows > begin:
                # No more than is left to read: what follows is decoded by whoever reads it.
                rows = min(_rows_at_once(facts.total_byte_size, facts.num_rows), end - first)
                batches = file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
                where = f"{path}: row group {group}"
                yield from _records(_guarded(batches, where), first, begin, end, others, rows)
            first += facts.num_rows


@contextlib.contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    with paths.open_binary(path) as content:
        try:
            # Without a buffer a whole column of a row group is read before its first value.
            file = pyarrow.parquet.ParquetFile(content, buffer_size=_READ_BYTES, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({first_line(error)})") from None
        yield file


def _rows_at_once(size: int, rows: int) -> int:
    return min(max(_BATCH_BYTES * rows // max(size, 1), 1), _BATCH_ROWS)


def _guarded(batches: Iterator[Any], where: str) -> Iterator[Any]:
    import pyarrow

    try:
        yield from batches
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page
        raise UserError(f"{where} cannot be read ({first_line(error)}); copy or write the file again") from None


def _columns(schema: Any, wanted: tuple[str, ...]) -> tuple[list[str] | None, dict[str, str]]:
    """(columns to read, None for all; if one is missing, all names, for the message that says so)."""
    if not wanted:
        return None, {}
    found = [name for name in wanted if _has(schema, name)]
    return found, {} if len(found) == len(set(wanted)) else dict.fromkeys(schema.names, "")


def _has(schema: Any, name: str) -> bool:
    if schema.get_field_index(name) >= 0:
        return True
    outer, _, inner = name.partition(".")
    if not inner or schema.get_field_index(outer) < 0:
        return False
    kind = schema.field(outer).type
    for part in inner.split("."):
        if not str(kind).startswith("struct") or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _records(
    batches: Iterator[Any], first: int, begin: int, end: int, others: dict[str, str], rows: int
) -> Iterator[Record]:
    """The records of batches, of which the first one begins with record `first`, in slices of at most `rows`."""
    for batch in batches:
        if first >= end:
            return
        low, high = max(begin - first, 0), min(end - first, batch.num_rows)
        for start in range(low, high, rows):
            part = batch.slice(start, min(rows, high - start))
            for index, fields in enumerate(_values(part), first + start):
                if isinstance(fields, str):
                    yield bad(index, fields)
                else:
                    yield Record(index, others | fields if others else fields)
        first += batch.num_rows


def _values(part: Any) -> list[dict[str, Any] | str]:
    """The rows of a batch; of one that Python cannot hold (a text that is no UTF-8, a time in the year 33658) why."""
    try:
        return part.to_pylist()
    except (ValueError, OverflowError) as error:
        if part.num_rows == 1:
            if isinstance(error, UnicodeDecodeError):
                return ["a text is not UTF-8; write the column as binary, or mend it"]
            return [f"a value cannot be read ({first_line(error)})"]
    return [value for index in range(part.num_rows) for value in _values(part.slice(index, 1))]


# arrow: IPC files or streams, such as the folders of datasets.save_to_disk


def arrow_file(path: str) -> SourceFile:
    """Rows of an Arrow file. A stream is read from its begin, which costs nothing where it is mapped into memory."""
    rows = 0
    with _Arrow(path, ()) as file:
        for batch in _guarded(file.batches(), path):
            rows += batch.num_rows
            file.release()
    return SourceFile(path, rows, paths.size(path), (0,) if paths.is_remote(path) else None)


def read_arrow(path: str, begin: int, end: int, wanted: tuple[str, ...] = ()) -> Iterator[Record]:
    first = 0
    with _Arrow(path, wanted) as file:
        for batch in _guarded(file.batches(), path):
            if first >= end:
                return
            if first + batch.num_rows > begin:
                rows = _rows_at_once(batch.nbytes, batch.num_rows)
                yield from _records(iter([batch]), first, begin, end, file.others, rows)
                file.release()
            first += batch.num_rows


class _Arrow:
    """An open Arrow file or stream, mapped into memory where it is local."""

    def __init__(self, path: str, wanted: tuple[str, ...]):
        import mmap

        import pyarrow

        self._file = paths.open_binary(path)
        self._map = None if paths.is_remote(path) else mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._dont_need = getattr(mmap, "MADV_DONTNEED", None)
        head = self._file.read(6)
        self._file.seek(0)
        source = self._file if self._map is None else pyarrow.BufferReader(pyarrow.py_buffer(self._map))
        try:
            if head == b"ARROW1":
                reader: Any = pyarrow.ipc.open_file(source)
                self.batches = lambda: (self._chosen(reader.get_batch(i)) for i in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(source)
                self.batches = lambda: map(self._chosen, reader)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not an Arrow file or stream ({first_line(error)})") from None
        self._columns, self.others = _columns(reader.schema, wanted)

    def _chosen(self, batch: Any) -> Any:
        """The wanted columns, one within a struct (`doc.text`) under that name: what stands beside it is not read."""
        if not self._columns:
            return batch if self._columns is None else batch.select([])
        import pyarrow

        return pyarrow.RecordBatch.from_arrays([_column(batch, name) for name in self._columns], self._columns)

    def release(self) -> None:
        """Gives the pages that were read back to the system."""
        if self._map is not None and self._dont_need is not None:
            self._map.madvise(self._dont_need)

    def __enter__(self) -> "_Arrow":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # the map goes with the last batch that refers to it


def _column(batch: Any, name: str) -> Any:
    """A column; of one within others it is null where one of those is."""
    if batch.schema.get_field_index(name) >= 0:
        return batch.column(name)
    import pyarrow.compute

    outer, *inner = name.split(".")
    functions: Any = pyarrow.compute
    return functions.struct_field(batch.column(outer), inner)


def arrow_files(folder: str, where: str) -> list[str] | None:
    """The files of a folder of datasets.save_to_disk, in its order; None for another folder."""
    names = paths.list_names(folder)
    if "dataset_dict.json" in names:
        splits = paths.read_json(paths.join(folder, "dataset_dict.json")).get("splits", [])
        raise UserError(f"{where}: {folder} holds the splits {', '.join(splits)}; give {paths.join(folder, 'SPLIT')}")
    if "state.json" not in names:
        return None
    state = paths.read_json(paths.join(folder, "state.json"))
    if state.get("_indices_data_files"):
        raise UserError(f"{where}: {folder} has an indices mapping; save it after dataset.flatten_indices()")
    try:
        files = [paths.join(folder, file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{where}: {folder}/state.json names no data files; save the dataset again") from None
    if not files:
        raise UserError(f"{where}: {folder} holds a dataset without rows; it needs text")
    return files
