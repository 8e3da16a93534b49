"""Records that cannot be used: refused at the first one, or left out, counted and named (config.data.on_bad_record).

What a shard left out stands in its JSON under `bad`, and of all shards in the index: {"count", "first": the first
ten as [file, offset, problem]}; where a record may be several documents, `records` says how many were read. A shard
without a bad record is the same under either rule.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.write import content, sources

FIRST = 10
_HOPELESS = 1000  # records, all of them bad, with which a file begins
_LINES_COUNTED = 4 << 30  # bytes before a record that are read again to tell the number of its line
_REMEDY = "mend it, or leave such records out: config.data.on_bad_record=skip"


class Tally:
    """Counts bad records of some files, given by number; under the rule "stop" the first one is an error."""

    def __init__(self, kind: str, files: Sequence[str], *, rule: str, several: bool = False):
        """several: a record may be several documents; then how many records there are is told too."""
        self._kind, self._files, self._rule = kind, files, rule
        self._fields = "the features of the task" if kind == "seqio" else "config.data.fields"
        self._several = several
        self.records = self.count = 0
        self.first: list[list[Any]] = []

    def add(self, file: int, offset: int, problem: str) -> None:
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append([file, offset, problem])
        if self._rule == "stop":
            raise UserError(f"{place(self._kind, self._files[int(file)], offset)}: {problem}; {_REMEDY}")
        if self.count == self.records == _HOPELESS:
            at = place(self._kind, self._files[file], offset)
            raise UserError(f"{at}: {problem}; all {_HOPELESS} first records are bad: check {self._fields}")

    def facts(self) -> dict[str, Any]:
        records = {"records": self.records} if self._several else {}
        return records | ({"bad": {"count": self.count, "first": self.first}} if self.count else {})


def total(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all shards as those of one."""
    found = [shard["bad"] for shard in shards if "bad" in shard]
    first = list(itertools.islice((entry for bad in found for entry in bad["first"]), FIRST))
    records = {"records": sum(map(_records, shards))} if any("records" in shard for shard in shards) else {}
    return records | ({"bad": {"count": sum(bad["count"] for bad in found), "first": first}} if found else {})


def check_none(shards: Sequence[dict[str, Any]], kind: str, files: Sequence[str]) -> None:
    """UserError for a token set that was written under the rule "skip" and holds less than its source."""
    for file, offset, problem in total(shards).get("bad", {"first": []})["first"][:1]:
        raise UserError(f"{place(kind, files[int(file)], offset)}: {problem}; {_REMEDY}")


def check_share(source: str, parts: Sequence[tuple[dict[str, Any], Sequence[str]]], share: float) -> None:
    """UserError for a source of which too many records are bad. parts: index and files of each token set that holds
    records of it, since a few held-out ones say little by themselves."""
    count = sum(index["bad"]["count"] for index, _ in parts if "bad" in index)
    records = sum(_records(index) for index, _ in parts)
    if count > share * records:
        first = next(line for index, files in parts for line in lines(index, source.partition(":")[0], files))
        raise UserError(
            f"{source}: {count} of {records} records are bad, which is more than config.data.max_bad_share={share:g}; "
            f"the first is {first}; mend them or raise the share"
        )


def _records(shard: dict[str, Any]) -> int:
    """Of a shard or an index, bad ones too. Where it was written before `records` was, `bad` may have them, and else
    there are as many as documents."""
    bad = shard.get("bad", {"count": 0})
    documents = bad["count"] + shard["documents"] + shard["skipped"]
    return shard.get("records", bad.get("records", documents))


def lines(index: dict[str, Any], kind: str, files: Sequence[str]) -> list[str]:
    """One line for each of the first bad records of a token set."""
    bad = index.get("bad", {"first": []})
    return [f"{place(kind, files[int(file)], offset)}: {problem}" for file, offset, problem in bad["first"]]


def place(kind: str, path: str, offset: int) -> str:
    """`PATH:LINE (byte N)` where a file has lines, else `PATH: record N` or `PATH`."""
    if kind == "seqio":  # the path is SOURCE#TASK-SHARD
        return f"{path}: example {offset}"
    if sources.unit(kind) == "record":
        return f"{path}: record {offset}"
    if kind == "text":  # the problem says where in the file
        return path
    line = _line(path, offset)
    return f"{path}: byte {offset}" if line is None else f"{path}:{line} (byte {offset})"


def _line(path: str, offset: int) -> int | None:
    """The number of the line in which byte `offset` stands, from 1; None where that takes too long to find."""
    if offset > _LINES_COUNTED:
        return None
    try:
        with content.open_content(path) as file:
            found, rest = 1, offset
            while rest and (block := file.read(min(rest, 1 << 20))):
                found += block.count(b"\n")
                rest -= len(block)
    except (OSError, UserError):  # the file is gone since
        return None
    return found
