"""The reader of CSV and TSV. A field may span lines, so a file is always read from its begin.

Where no separator is given it is the one by which the header names most of the fields that are wanted: comma, tab,
semicolon or bar; of a file named .tsv the tab comes first.
"""

import csv
from collections.abc import Iterator

from t5x_like.core.errors import UserError
from t5x_like.data.write import content
from t5x_like.data.write.records import BOM, Record, bad, not_utf8

_SEPARATORS = (",", "\t", ";", "|")
_ENDINGS = (".gz", ".zst", ".bz2", ".xz")


def read_csv(path: str, begin: int, end: int, wanted: tuple[str, ...] = (), separator: str = "") -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    rows = _Rows(path)
    try:
        header = _header(path, rows.reader(separator or _separator(path, wanted)))
        while True:
            offset = rows.position
            values = rows.next()
            if values is None or offset >= end:
                return
            if offset < begin or not values:
                continue
            if rows.problem:
                yield bad(offset, rows.problem)
            elif len(values) != len(header):
                yield bad(offset, f"the row has {len(values)} fields, the header {len(header)}")
            else:
                yield Record(offset, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}: not csv before byte {rows.position} ({error})") from None


class _Rows:
    """The rows of a file. `position`: bytes read; `problem`: what is no UTF-8 in the row that came last."""

    def __init__(self, path: str):
        self._path, self.position, self.problem = path, 0, ""

    def reader(self, separator: str) -> list[str]:
        self._rows = csv.reader(self._lines(), strict=True, delimiter=separator)
        return self.next() or []

    def next(self) -> list[str] | None:
        self.problem = ""
        return next(self._rows, None)

    def _lines(self) -> Iterator[str]:
        with content.open_content(self._path) as file:
            for line in file:
                offset = self.position
                self.position += len(line)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    if not offset:
                        raise UserError(f"{self._path}: {not_utf8(line, error, offset)}") from None
                    self.problem = self.problem or not_utf8(line, error, offset)
                    text = line.decode("utf-8", errors="replace")
                yield text if offset else text.removeprefix("\ufeff")


def _header(path: str, names: list[str]) -> list[str]:
    twice = [name for index, name in enumerate(names) if name and name in names[:index]]
    if twice:
        raise UserError(f"{path}: the header names {twice[0]!r} twice; give each column a name of its own")
    return names


def _separator(path: str, wanted: tuple[str, ...]) -> str:
    name = path.lower()
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    first = "\t" if name.endswith((".tsv", ".tab")) else ","
    with content.open_content(path) as file:
        line = file.readline().removeprefix(BOM).decode("utf-8", errors="replace")

    def named(separator: str) -> int:
        try:
            return len({*wanted} & {*next(csv.reader([line], delimiter=separator), [])})
        except csv.Error:
            return 0

    return max(sorted(_SEPARATORS, key=lambda each: each != first), key=named)
