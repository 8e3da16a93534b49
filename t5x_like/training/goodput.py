"""Where the wall clock of a run went, over all starts of its workdir, which training/starts.py reads: added up here.

The parts add up to the time from the begin of the first start to the last line of the record. `PARTS` says what each
part of one start is. Over all starts these follow from them:

    productive  steps that stand (with rollouts, rewards and scoring, of reinforcement learning): no later start went
                back behind them. Goodput is its share of the wall clock.
    lost        the same time of steps that did not stand: a later start went on from a checkpoint before them. They
                are lost where they were done first, and productive in the last start that did them again. A step that
                was under way when a start ended is lost too. Input, evaluation and checkpoints stay what they were.
    idle        from the last line of a start to the begin of the next one: nobody ran, or a killed start had written
                no more lines (a second, or a thousandth of its age; in a bucket, up to a minute and a hundredth)
    unknown     of starts that are not in the record: what their metrics.jsonl and manifest do not tell. They are from
                before it, of a later layout, or were killed before the first upload to a bucket. Rows of steps that
                were done again are cut from metrics.jsonl, so that from the last row that was kept to the next start
                lost steps, idle time and starting cannot be told apart.

No array library is imported here.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

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
    "unknown": "starts that are not in the record: what rows and manifest do not tell",
}
_SHOWN = ("input", "checkpoint", "restore", "compile")  # in every row, beside what is productive, lost and idle


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
            return productive(self.seconds), 0
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
        return sum(productive(self.seconds).values())

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
        spent = sum(productive(start.seconds).values())
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


def earlier(starts: Sequence[Start], *, entry: int) -> dict[str, float]:
    """What all starts but that of `entry`, which goes on and may not be recorded, have spent; with the time between.

    In the names of `shares`: "wall", "productive" and others in seconds; "starts", which counts the one that goes on.
    """
    found = account(starts)
    recorded_here = bool(starts) and starts[-1].entry == entry
    own = starts[-1].seconds if recorded_here else {}
    return {
        "wall": found.wall - sum(own.values()),
        "productive": found.productive - sum(productive(own).values()),
        **{name: found.seconds.get(name, 0.0) for name in ("lost", "idle")},
        **{name: found.seconds.get(name, 0.0) - own.get(name, 0.0) for name in _SHOWN},
        "starts": float(len(starts) + (not recorded_here)),
    }


def shares(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """The few numbers of a row of metrics: shares of the wall clock over all starts, and how many there were.

    before: of `earlier`; now: seconds of the parts of this start.
    """
    wall = max(before["wall"] + sum(now.values()), 1e-9)
    seconds = {
        "productive": before["productive"] + sum(productive(now).values()),
        **{name: before[name] for name in ("lost", "idle")},
        **{name: before[name] + now.get(name, 0.0) for name in _SHOWN},
    }
    return {f"goodput/{name}": value / wall for name, value in seconds.items()} | {"goodput/starts": before["starts"]}


def productive(seconds: Mapping[str, float]) -> dict[str, float]:
    """Those of PRODUCTIVE that occur."""
    return {name: seconds[name] for name in PRODUCTIVE if name in seconds}


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
