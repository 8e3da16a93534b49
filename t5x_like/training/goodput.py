"""Where the wall clock of a run went, over all starts of its workdir: read from WORKDIR/goodput.jsonl, added up here.

The parts add up to the time from the begin of the first start to the last line of the record. `PARTS` says what each
part of one start is. Over all starts these follow from them:

    productive  steps that stand (with rollouts, rewards and scoring, of reinforcement learning): no later start went
                back behind them. Goodput is its share of the wall clock.
    lost        the same time of steps that did not stand: a later start went on from a checkpoint before them. They
                are lost where they were done first, and productive in the last start that did them again. A step that
                was under way when a start ended is lost too. Input, evaluation and checkpoints stay what they were.
    idle        from the last line of a start to the begin of the next one: nobody ran, or a killed start had written
                no more lines (a second, or a thousandth of its age; in a bucket, up to a minute and a hundredth)
    unknown     of starts before this record existed: what their metrics.jsonl and manifest do not tell. Rows of steps
                that were done again are cut from metrics.jsonl, so that from the last row that was kept to the next
                start lost steps, idle time and starting cannot be told apart.

No array library is imported here.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_like.core.metrics import read_rows
from t5x_like.storage import manifest, paths

NAME = "goodput.jsonl"

# What the time of one start is spent on, in the order of the table; seconds of process 0.
PARTS: Mapping[str, str] = {
    "steps": "steps of training: dispatched, and waited for",
    "rollout": "answers of the policy are drawn",
    "reward": "answers are judged",
    "scoring": "log-probabilities of answers under policy and reference",
    "input": "the loop waits for its batch; devices may still be busy with the step before",
    "evaluate": "evaluations within the run",
    "checkpoint": "the loop waits while a checkpoint begins, or for the last one to end",
    "startup": "imports, processes joined, mesh and program built",
    "prepare": "data prepared and opened, prompts read",
    "restore": "a checkpoint read, or the first parameters drawn or read",
    "compile": "programs compiled, or read from the compilation cache",
    "closing": "after the loop: pictures, trackers, files closed",
}
PRODUCTIVE = ("steps", "rollout", "reward", "scoring")
DERIVED: Mapping[str, str] = {
    "lost": "steps that were done again after a start that went back to a checkpoint",
    "idle": "between starts",
    "unknown": "starts from before this record: what rows and manifest do not tell",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """One start as it was recorded.

    number: from 1. began, ended: seconds since 1970, of its begin and its last line. first: updates done when it went
    on, None if it never got there. reached: updates done at its last line. seconds: of every part, which add up to
    `ended - began`. marks: (step, seconds of the productive parts when it was done), ascending. entry: its index in
    the manifest. how: how it ended, "" where nobody noted that (it runs, or was killed).
    """

    number: int
    began: float
    ended: float
    first: int | None
    reached: int
    seconds: Mapping[str, float]
    marks: Sequence[tuple[int, Mapping[str, float]]]
    entry: int | None
    how: str
    recorded: bool = True

    def kept(self, cut: float) -> tuple[dict[str, float], int]:
        """(seconds of the productive parts that stand, steps lost) where a later start went on from step `cut`."""
        if math.isinf(cut):
            return {name: self.seconds[name] for name in PRODUCTIVE if name in self.seconds}, 0
        standing = [done for step, done in self.marks if step <= cut]
        behind = max(cut, self.first or 0)
        return dict(standing[-1]) if standing else {}, max(0, self.reached - int(behind))


@dataclasses.dataclass(frozen=True)
class Account:
    """All starts added up. seconds: of every part of PARTS and DERIVED that occurs; their sum is `wall`. `lost_steps`
    were done again, or will be. rows: of each start {"number", "began", "lost", "lost_steps", "idle_before", ...}."""

    began: float
    seconds: Mapping[str, float]
    lost_steps: int
    rows: Sequence[Mapping[str, Any]]

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def productive(self) -> float:
        return sum(self.seconds.get(name, 0.0) for name in PRODUCTIVE)

    @property
    def goodput(self) -> float:
        return self.productive / self.wall if self.wall > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "began": round(self.began, 3),
            "wall_seconds": round(self.wall, 3),
            "goodput": round(self.goodput, 6),
            "productive_seconds": round(self.productive, 3),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "lost_steps": self.lost_steps,
            "starts": [dict(row) for row in self.rows],
        }


def account(starts: Sequence[Start]) -> Account:
    """What all starts together spent their time on; `starts` in their order. An empty list has spent nothing."""
    if not starts:
        return Account(0.0, {}, 0, [])
    total: dict[str, float] = defaultdict(float)
    rows: list[dict[str, Any]] = []
    cut, before = math.inf, None  # the least step that a later start went on from; the start after this one
    for start in reversed(starts):
        kept, lost_steps = start.kept(cut)
        spent = sum(start.seconds.get(name, 0.0) for name in PRODUCTIVE)
        lost = max(0.0, spent - sum(kept.values()))
        for name, value in start.seconds.items():
            total[name] += kept.get(name, 0.0) if name in PRODUCTIVE else value
        total["lost"] += lost
        gap = 0.0 if before is None else max(0.0, before.began - start.ended)
        total["idle" if start.recorded else "unknown"] += gap
        if rows:
            rows[0]["idle_before"] = round(gap, 3) if start.recorded else None
        rows.insert(0, _row(start, kept, lost, lost_steps, last=before is None))
        cut = min(cut, math.inf if start.first is None else start.first)
        before = start
    seconds = {name: total[name] for name in (*PARTS, *DERIVED) if total.get(name)}
    return Account(starts[0].began, seconds, sum(row["lost_steps"] for row in rows), rows)


def earlier(starts: Sequence[Start]) -> dict[str, float]:
    """What all starts but the last, which goes on, have spent, in the names of `shares`; with the time between."""
    found, own = account(starts), starts[-1].seconds
    spent = sum(own.values())
    productive = sum(own.get(name, 0.0) for name in PRODUCTIVE)
    return {
        "wall": found.wall - spent,
        "productive": found.productive - productive,
        "lost": found.seconds.get("lost", 0.0),
        "idle": found.seconds.get("idle", 0.0),
        "starts": float(len(starts)),
    }


def shares(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """The few numbers of a row of metrics: shares of the wall clock over all starts, and how many there were.

    before: of `earlier`; now: seconds of the parts of this start.
    """
    wall = max(before["wall"] + sum(now.values()), 1e-9)
    productive = before["productive"] + sum(now.get(name, 0.0) for name in PRODUCTIVE)
    return {
        "goodput/productive": productive / wall,
        "goodput/lost": before["lost"] / wall,
        "goodput/idle": before["idle"] / wall,
        "goodput/starts": before["starts"],
    }


def _row(start: Start, kept: Mapping[str, float], lost: float, lost_steps: int, *, last: bool) -> dict[str, Any]:
    unsaid = "not ended" if last else "killed"
    return {
        "number": start.number,
        "began": round(start.began, 3),
        "seconds": {name: round(value, 3) for name, value in start.seconds.items()},
        "first_step": start.first,
        "last_step": start.reached,
        "productive": round(sum(kept.values()), 3),
        "lost": round(lost, 3),
        "lost_steps": lost_steps,
        "idle_before": 0.0,
        "recorded": start.recorded,
        "ended": start.how or (unsaid if start.recorded else "not recorded"),
    }


# Reading.


def read(workdir: str, *, record: str | None = None) -> list[Start]:
    """The starts of a workdir in order, those from before this record as far as rows and manifest tell.

    record: a local file that is newer than the workdir's own goodput.jsonl.
    """
    workdir = paths.normal(workdir)
    starts = list(recorded(record or paths.join(workdir, NAME)))
    entries = manifest.read(workdir)["starts"]
    known = {start.entry for start in starts}
    older = [entry for index, entry in enumerate(entries) if index not in known]
    if older:
        until = min((start.began for start in starts), default=math.inf)
        starts = [*_unrecorded(workdir, older, until=until), *starts]
    return [dataclasses.replace(start, number=number) for number, start in enumerate(starts, 1)]


def recorded(path: str) -> Iterator[Start]:
    """The starts in a goodput.jsonl."""
    if not paths.exists(path):
        return
    lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in _lines(paths.read_bytes(path)):
        lines[line["start"]].append(line)
    numbers = sorted(lines)
    for number, follower in zip(numbers, [*numbers[1:], None], strict=True):
        found = {} if follower is None else lines[follower][0].get("found") or {}
        start = _start(lines[number], found)
        if start is not None:
            yield start


def read_lines(path: str) -> Iterator[dict[str, Any]]:
    """The lines of a local goodput.jsonl that are whole; none where there is no file."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        yield from _lines(file.read())


def compacted(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is needed of starts that have ended: events, and the last line of each."""
    last = {line["start"]: line for line in lines}
    return [line for line in lines if "event" in line or line is last[line["start"]]]


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    for text in content.split(b"\n"):
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("start"), int) and "seconds" in line:
                yield line


def _start(lines: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Start | None:
    """Of the lines of one start, and the last row of metrics that the next start found: it may be newer."""
    events = {line["event"]: line for line in lines if "event" in line}
    last, began = lines[-1], events.get("begin", {}).get("began")
    if began is None:
        return None
    seconds, ended, reached = dict(last["seconds"]), last["time"], last["step"]
    restored = events.get("restored", {})
    marks: dict[int, dict[str, float]] = {}
    for line in lines:
        if "from" in restored and line["step"] >= restored["from"]:
            marks.setdefault(line["step"], line["done"])
    if found and found["time"] > began and found["step"] > reached and marks:
        # The row was written when its step was done.
        reached, more = found["step"], max(0.0, found["time"] - ended)
        seconds["steps"] = seconds.get("steps", 0.0) + more
        ended += more
        marks[reached] = {name: seconds[name] for name in PRODUCTIVE if name in seconds}
    return Start(
        number=last["start"],
        began=began,
        ended=ended,
        first=restored.get("from"),
        reached=reached,
        seconds=seconds,
        marks=sorted(marks.items()),
        entry=restored.get("entry"),
        how=events.get("end", {}).get("how", ""),
    )


# Starts from before the record.


def _unrecorded(workdir: str, entries: Sequence[Mapping[str, Any]], *, until: float) -> Iterator[Start]:
    """Starts of which there are the manifest's entries and the rows of metrics that were kept."""
    rows = _rows(workdir)
    finished = manifest.read(workdir).get("finished") or {}
    begins = [_seconds(entry.get("time", "")) for entry in entries]
    begins = [begin for begin in begins if begin is not None]
    for index, (began, follows) in enumerate(zip(begins, [*begins[1:], until], strict=True)):
        within = [row for row in rows if began <= row.get("time", 0.0) < follows]
        last = within[-1] if within else {"step": 0, "time": began}
        ended, is_last = last["time"], index == len(begins) - 1
        if is_last and began <= finished.get("time", 0.0) < follows:
            ended = max(ended, finished["time"])
        resumed = entries[index].get("resumed_from")
        shares = next((row for row in reversed(within) if "time/compile_share" in row), {})
        seconds = _of_shares(shares, age=shares.get("time", began) - began)
        if ended - began - sum(seconds.values()) > 0:
            seconds["unknown"] = ended - began - sum(seconds.values())
        productive = {name: seconds[name] for name in PRODUCTIVE if name in seconds}
        reached = max(last["step"], resumed or 0)
        yield Start(
            number=index + 1,
            began=began,
            ended=ended,
            first=resumed or 0,
            reached=reached,
            seconds=seconds,
            marks=[(0, productive)],  # rows of steps that did not stand are gone
            entry=None,
            how="finished" if is_last and finished else "",
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


def _seconds(text: str) -> float | None:
    """Seconds since 1970 of a time of the manifest, which has a zone."""
    with contextlib.suppress(ValueError, TypeError):
        return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return None
