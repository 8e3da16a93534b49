"""The search: which points the compiler is asked about, in which order, and which of them is the best.

The analytic model orders the points and drops those that cannot fit; the compiler judges the first ones. What it
refuses for memory drops also what the model takes to be clearly larger. Where points are explored with the compiler's
default options, which compile several times faster, the best are judged again as they would run.

Not here: the space (space.py), processes (judges.py), what is kept (index.py), the table (report.py).
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes
from t5x_like.planner.search import index as search_index
from t5x_like.planner.search.index import Entry, Index, Verdict

# The analytic model may be wrong by so much before a point is dropped on its word alone: see docs/planner.md.
DOUBT = 1.15
# A point that the compiler refuses drops those for which the model expects at least so much more memory.
MORE = 1.05
# Points whose times differ by less are equal to the analytic model.
EQUAL = 1.02


@dataclasses.dataclass(frozen=True)
class Limits:
    """points: how many the compiler judges at most; confirm: how many of the best it judges again with the config's own
    compiler options, 0 where they are explored with these; hbm_bytes: of a device."""

    points: int
    confirm: int
    hbm_bytes: int


class Search:
    """One search over the entries of an index. It hands out names and is told what came of them."""

    def __init__(self, index: Index, limits: Limits):
        self.index, self.limits = index, limits
        self._running: set[str] = set()
        self._order = sorted(
            (entry.name for entry in index if entry.state not in (search_index.ILLEGAL, search_index.LARGE)),
            key=lambda name: (index[name].analytic["seconds"], len(index[name].point.overrides), name),
        )

        for entry in list(index):
            if entry.state == search_index.REFUSED:
                self._drop_larger(entry.name)

    def following(self) -> str | None:
        """The next point to be judged, None where there is none (now)."""
        open_names = [name for name in self._order if name not in self._running and self._is_open(name)]
        judged = len(self._asked()) + len(self._running)
        if judged >= self.limits.points or not open_names:
            return None
        # Late and nothing fits: rather one that does than the fastest.
        desperate = 2 * judged >= self.limits.points and not any(entry.verdict for entry in self.index)
        chosen = min(open_names, key=self._bytes) if desperate else self._promising(open_names)
        self._running.add(chosen)
        return chosen

    def _promising(self, names: Sequence[str]) -> str:
        """The fastest, by the analytic model; of those that it holds equal, one on a mesh that was tried least."""
        equal = [name for name in names if self._seconds(name) <= EQUAL * self._seconds(names[0])]
        tried = collections.Counter(entry.point.mesh for entry in self._asked())
        tried.update(self.index[name].point.mesh for name in self._running)
        return min(equal, key=lambda name: tried[self.index[name].point.mesh])

    def following_to_confirm(self) -> str | None:
        """The next of the best that is to be judged with the config's own compiler options."""
        fit = [e for e in self.index if e.state == search_index.JUDGED and e.verdict is not None and not e.refused]
        fit.sort(key=lambda entry: (entry.verdict.seconds if entry.verdict else math.inf, entry.name))
        for entry in fit[: self.limits.confirm]:
            if not (entry.confirmed or entry.unconfirmed or entry.name in self._running):
                self._running.add(entry.name)
                return entry.name
        return None

    def judged(self, name: str, verdict: Verdict) -> None:
        """A point compiled. One that compiles and still is too large is refused."""
        self._running.discard(name)
        if verdict.bytes > self.limits.hbm_bytes:
            self.refused(name, self._too_large(verdict))
        else:
            self.index.change(name, state=search_index.JUDGED, verdict=verdict, said="")

    def refused(self, name: str, said: str) -> None:
        """The compiler refused a point for want of memory; so it would those that are clearly larger."""
        self._running.discard(name)
        self.index.change(name, state=search_index.REFUSED, said=said)
        self._drop_larger(name)

    def confirmed(self, name: str, verdict: Verdict) -> None:
        """A point compiled with the config's own options. One that is too large with these is refused."""
        self._running.discard(name)
        if verdict.bytes > self.limits.hbm_bytes:
            self.not_confirmed(name, self._too_large(verdict))
        else:
            self.index.change(name, confirmed=verdict, unconfirmed="")

    def not_confirmed(self, name: str, said: str) -> None:
        """With the config's own options the compiler refuses a point for want of memory."""
        self._running.discard(name)
        self.index.change(name, refused=said, unconfirmed="")

    def unconfirmed(self, name: str, said: str, limits: tuple[float, float]) -> None:
        """No judgement with the config's own options: the one without them stays in force. limits: as for `failed`."""
        self._running.discard(name)
        self.index.change(name, unconfirmed=said, limits=limits)

    def failed(self, name: str, said: str, limits: tuple[float, float]) -> None:
        """No judgement. limits: bytes and seconds that the judge had; with more it is tried again."""
        self._running.discard(name)
        self.index.change(name, state=search_index.FAILED, said=said, limits=limits)

    def reopen(self, limits: tuple[float, float]) -> None:
        """Points whose judge failed within smaller limits are open again. A limit of 0 is none."""
        for entry in list(self.index):
            if not any((new or math.inf) > (old or math.inf) for new, old in zip(limits, entry.limits, strict=True)):
                continue
            if entry.state == search_index.FAILED:
                self.index.change(entry.name, state=search_index.OPEN, said="")
            elif entry.unconfirmed:
                self.index.change(entry.name, unconfirmed="")

    def why_none(self) -> str:
        """What stood in the way where no point that was judged fits, and what would help, in words."""
        legal = [entry for entry in self.index if entry.analytic]
        least = min(legal, key=lambda entry: (entry.analytic["bytes"], entry.name))
        needs = f"{format_bytes(least.analytic['bytes'])} of {format_bytes(self.limits.hbm_bytes)} a device"
        smallest = f"the smallest of {len(legal):,}, {least.name}, needs about {needs} by the analytic model"
        asked = self._asked()
        failed = [entry for entry in asked if entry.state == search_index.FAILED]
        if failed:
            return f"{len(failed)} of {len(asked)} could not be judged, such as {failed[0].name}: {failed[0].said}"
        if least.analytic["bytes"] > self.limits.hbm_bytes:
            return f"{smallest}; give more chips, a smaller batch, or more micro-batches or full remat in the space"
        if any(entry.state == search_index.OPEN for entry in legal):
            return f"{smallest}; give more --points"
        return f"{smallest}, and the compiler refuses it; give more chips, a smaller batch or a wider space"

    def best(self) -> Entry | None:
        found = ranking(self.index)
        return found[0] if found else None

    def _drop_larger(self, name: str) -> None:
        """Drops what needs clearly more memory than a point that the compiler refuses."""
        least = MORE * self._bytes(name)
        said = f"needs more than {name}, which the compiler refuses, by the analytic model"
        for other in self._order:
            if other not in self._running and self._is_open(other) and self._bytes(other) >= least:
                self.index.change(other, state=search_index.LARGE, said=said, write=False)
        self.index.write()

    def _too_large(self, verdict: Verdict) -> str:
        return f"it needs {format_bytes(verdict.bytes)} of {format_bytes(self.limits.hbm_bytes)}"

    def _is_open(self, name: str) -> bool:
        return self.index[name].state == search_index.OPEN

    def _asked(self) -> list[Entry]:
        return [entry for entry in self.index if entry.state in search_index.ASKED]

    def _seconds(self, name: str) -> float:
        return self.index[name].analytic["seconds"]

    def _bytes(self, name: str) -> int:
        return self.index[name].analytic.get("bytes", 0)


def ranking(index: Index) -> list[Entry]:
    """The points that fit, best first: those that are confirmed, then the others, each kind by time of a step."""
    found = [entry for entry in index if entry.state == search_index.JUDGED and entry.best is not None]
    return sorted(found, key=lambda e: (e.confirmed is None, e.best.seconds if e.best else math.inf, e.name))


def first_state(
    problem: str, analytic: Mapping[str, Any], hbm_bytes: int, host_bytes: float = math.inf
) -> tuple[str, str]:
    """(state, what is said) of a point that nobody has asked the compiler about. problem: why `train` refuses it;
    host_bytes: a device's part of the memory of its host."""
    if problem:
        return search_index.ILLEGAL, problem
    if analytic["bytes"] > DOUBT * hbm_bytes:
        needs = f"needs about {format_bytes(analytic['bytes'])} of {format_bytes(hbm_bytes)} by the analytic model"
        return search_index.LARGE, needs
    if analytic.get("on_host", 0) > host_bytes:
        needs = f"{format_bytes(analytic['on_host'])} of {format_bytes(host_bytes)} of the host"
        return search_index.LARGE, f"leaves about {needs} by the analytic model"
    return search_index.OPEN, ""


def verdict(plan: Mapping[str, Any]) -> Verdict:
    """What a plan's JSON says."""
    estimate = plan["estimate"]
    return Verdict(
        seconds=float(estimate["step_seconds"]),
        bytes=int(plan["memory"]["total_bytes"]),
        bound_by=str(estimate["bound_by"]),
        mfu=float(estimate["mfu"]),
        cycles=int(plan["cycles"]),
    )
