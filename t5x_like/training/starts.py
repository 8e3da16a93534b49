"""The starts of a run: read from WORKDIR/goodput.jsonl (training/ledger.py), or else from manifest and rows of metrics.

A file that is damaged, or of a later format, costs what it says, never the run. No array library is imported here.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import operator
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_like.core.metrics import read_rows
from t5x_like.storage import manifest, paths
from t5x_like.training.goodput import PARTS, Start, productive

NAME = "goodput.jsonl"
FORMAT = 1  # of the lines of a start; its "begin" says it, those of the first starts ever recorded say nothing


def quiet(age: float) -> float:
    """Seconds between two lines of a start of this age: up to these it is known what a killed one did."""
    return max(1.0, 1e-3 * age)


def read(workdir: str, *, record: str | None = None) -> list[Start]:
    """The starts of a workdir in order, those that are not recorded as far as rows and manifest tell.

    record: a local file that is newer than the workdir's own goodput.jsonl.
    """
    workdir = paths.normal(workdir)
    starts = list(recorded(record or paths.join(workdir, NAME)))
    content = manifest.read(workdir)
    entries = content["starts"]
    if not {start.entry for start in starts}.issuperset(range(len(entries))):
        finished = (content.get("finished") or {}).get("time")
        starts = _with_unrecorded(workdir, starts, entries, finished=finished)
    return [dataclasses.replace(start, number=number) for number, start in enumerate(starts, 1)]


def recorded(path: str) -> Iterator[Start]:
    """The starts in a goodput.jsonl, but for those that are damaged or of a later format."""
    if not paths.exists(path):
        return
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in _lines(paths.read_bytes(path)):
        lines[line["start"]].append(line)
    numbers = sorted(lines)
    for number, follower in zip(numbers, [*numbers[1:], None], strict=True):
        if _is_later(lines[number]):
            continue
        follows = lines[follower] if follower is not None else []
        found = follows[0].get("found") if follows and not _is_later(follows) else None
        start = None
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            start = _start(lines[number], found or {})
        if start is not None:
            yield start


def read_lines(path: str) -> Iterator[dict[str, Any]]:
    """The lines of a local goodput.jsonl that are whole, of any format; none where there is no file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        yield from _lines(file.read())


def compacted(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is needed of starts that have ended: events, and the last line of each. Of a later format that is all."""
    if _is_later(lines):
        return list(lines)
    last = {line["start"]: line for line in lines}
    return [line for line in lines if "event" in line or line is last[line["start"]]]


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    for text in content.split(b"\n"):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("start"), int):
                yield line


def _is_later(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any(line.get("format", FORMAT) != FORMAT for line in lines)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return value


def _numbers(seconds: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of parts, those of no part that is known here summed up."""
    found: dict[str, float] = {}
    for name, value in seconds.items():
        known = name if name in PARTS else "unknown"
        found[known] = found.get(known, 0.0) + _number(value)
    return found


def _start(lines: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Start | None:
    """Of the lines of one start, and the last row of metrics that the next start found: it may be newer.

    None where the begin is missing. Raises KeyError, TypeError, ValueError or AttributeError for damaged lines.
    """
    events = {line["event"]: line for line in lines if "event" in line}
    last = lines[-1]
    if "begin" not in events:
        return None
    began, ended = _number(events["begin"]["began"]), _number(last["time"])
    seconds, reached = _numbers(last["seconds"]), operator.index(last["step"])
    restored = events.get("restored")
    first, entry = (operator.index(restored[name]) for name in ("from", "entry")) if restored else (None, None)
    marks: dict[int, dict[str, float]] = {}
    for line in lines:
        if first is not None and line["step"] >= first:
            marks.setdefault(line["step"], _numbers(line["done"]))
    if found and _number(found["time"]) > began and found["step"] > reached and marks:
        # The row was written when its step was done, but by the clock on the wall, which is set at times and goes on
        # while the machine sleeps; that of the lines does neither. What no line can have missed was not spent.
        more = min(max(0.0, found["time"] - ended), 2 * quiet(ended - began))
        reached = operator.index(found["step"])
        seconds["steps"] = seconds.get("steps", 0.0) + more
        ended += more
        marks[reached] = productive(seconds)
    return Start(
        number=last["start"],
        began=began,
        ended=ended,
        first=first,
        reached=reached,
        seconds=seconds,
        marks=sorted(marks.items()),
        entry=entry,
        how=str(events.get("end", {}).get("how", "")),
    )


# Starts that are not recorded.


def _with_unrecorded(
    workdir: str, starts: Sequence[Start], entries: Sequence[Mapping[str, Any]], *, finished: float | None
) -> list[Start]:
    """`starts` among those of which there are only the manifest's entry and the rows of metrics that were kept."""
    known, found = {start.entry for start in starts}, list(starts)
    rows = _rows(workdir)
    for index in reversed(range(len(entries))):  # the last one first: each ends where the next one begins
        began = _seconds(entries[index].get("time"))
        if index in known or began is None:
            continue
        place = _place(found, index, began)
        until = found[place].began if place < len(found) else math.inf
        within = [row for row in rows if began <= row.get("time", 0.0) < until]
        last = finished if index == len(entries) - 1 and finished is not None and began <= finished < until else None
        found.insert(place, _of_rows(within, entries[index], index, began=began, finished=last))
    return found


def _place(starts: Sequence[Start], entry: int, began: float) -> int:
    """Where among `starts` one of this entry belongs. The manifest says it; clocks only where a start has no entry."""
    earlier_ones = (place for place, start in enumerate(starts) if start.entry is not None and start.entry < entry)
    first = 1 + max(earlier_ones, default=-1)
    for place, start in enumerate(starts[first:], first):
        if start.began > began if start.entry is None else start.entry > entry:
            return place
    return len(starts)


def _of_rows(
    rows: Sequence[Mapping[str, Any]], entry: Mapping[str, Any], index: int, *, began: float, finished: float | None
) -> Start:
    """The start of an entry of the manifest, of which there are these rows; `finished` if all steps were done then."""
    resumed = entry.get("resumed_from") or 0
    last = rows[-1] if rows else {"step": 0, "time": began}
    ended = max(last["time"], finished or 0.0)
    shares = next((row for row in reversed(rows) if "time/compile_share" in row), {})
    seconds = _of_shares(shares, age=shares.get("time", began) - began)
    if ended - began - sum(seconds.values()) > 0:
        seconds["unknown"] = ended - began - sum(seconds.values())
    return Start(
        number=0,
        began=began,
        ended=ended,
        first=resumed,
        reached=max(last["step"], resumed),
        seconds=seconds,
        marks=[(0, productive(seconds))],  # rows of steps that did not stand are gone
        entry=index,
        how="" if finished is None else "finished",
        recorded=False,
    )


def _of_shares(row: Mapping[str, float], *, age: float) -> dict[str, float]:
    """Seconds of the parts from the shares that a row has of them; what is in none of them are steps."""
    shares = {name: row[f"time/{name}_share"] for name in PARTS if f"time/{name}_share" in row}
    seconds = {name: share * age for name, share in shares.items()}
    return seconds | ({"steps": max(0.0, age - sum(seconds.values()))} if shares else {})


def _rows(workdir: str) -> list[dict[str, Any]]:
    path = paths.join(workdir, "metrics.jsonl")
    if not paths.exists(path):
        return []
    if not paths.is_remote(path):
        return list(read_rows(path))
    with tempfile.TemporaryDirectory(prefix="t5x_like-metrics-") as folder:
        local = os.path.join(folder, "metrics.jsonl")
        paths.copy_file(path, local)
        return list(read_rows(local))


def _seconds(text: Any) -> float | None:
    """Seconds since 1970 of a time of the manifest, which has a zone."""
    with contextlib.suppress(ValueError, TypeError):
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None
