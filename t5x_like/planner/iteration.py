"""The plan of an iteration that is several programs, one after the other (a rollout, its scores, the updates).

Each program has the section that a plan of its own would have; besides, what a device holds while it runs and it does
not read, such as the optimizer's state, and how often it runs in an iteration. All figures are of one device and are
the compiler's estimates.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes
from t5x_like.planner import report
from t5x_like.planner.compile import Compiled
from t5x_like.planner.memory import report as report_memory
from t5x_like.planner.report import Place
from t5x_like.planner.time import collectives
from t5x_like.planner.time import report as report_time
from t5x_like.planner.time.cost import Cost
from t5x_like.planner.time.estimate import Estimate, IterationTime


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of an iteration. times: executions; beside_bytes: held meanwhile, and not among its arguments.

    found: what the compiler made of it, and how long that should take; None where memory is too small for it, as
    `problem` then says.
    """

    name: str
    does: str
    times: int
    beside_bytes: int
    found: tuple[Compiled, Cost, Estimate] | None
    problem: str

    @property
    def bytes(self) -> int | None:
        """HBM of a device while it runs."""
        return None if self.found is None else self.found[0].memory.total_bytes + self.beside_bytes

    def fits(self, place: Place) -> bool:
        return not self.trouble(place)

    def trouble(self, place: Place) -> str:
        """Why it cannot run, also where it is too large only with what is held beside it; "" where it can. Of a program
        alone it is the compiler that decides."""
        if self.problem or not self.beside_bytes or (self.bytes is not None and self.bytes <= place.hbm_bytes):
            return self.problem
        return report_memory.fit(self.bytes or 0, place.hbm_bytes)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """facts: what an iteration is, for the head of the table. executions: iterations of a whole run."""

    program: str
    place: Place
    facts: Sequence[str]
    parts: Sequence[Part]
    executions: int | None = None

    @property
    def problems(self) -> list[str]:
        """One line for each program that does not fit."""
        return [f"{part.name}: {part.trouble(self.place)}" for part in self.parts if not part.fits(self.place)]

    def collectives(self) -> list[collectives.Collective]:
        """Of all programs that were compiled, as often as they run in an iteration."""
        return [
            dataclasses.replace(item, count=item.count * part.times)
            for part in self.parts
            if part.found is not None
            for item in part.found[1].collectives
        ]

    @property
    def cycles(self) -> int:
        return sum(part.times * part.found[1].cycles for part in self.parts if part.found is not None)

    @property
    def time(self) -> IterationTime | None:
        """None where the iteration cannot run."""
        if self.problems or not self.parts:
            return None
        parts = {part.name: (part.times, part.found[2]) for part in self.parts if part.found is not None}
        return IterationTime(parts, self.executions)

    @property
    def largest(self) -> Part | None:
        """The program that needs the most memory, of those that were compiled."""
        return max((part for part in self.parts if part.bytes is not None), key=lambda p: p.bytes or 0, default=None)


def to_json(iteration: Iteration) -> dict[str, Any]:
    """The content of `plan --json`: of each program what its own plan would hold, and sums. Later versions add keys."""
    largest = iteration.largest
    return {
        "program": iteration.program,
        **report.place_json(iteration.place),
        "facts": list(iteration.facts),
        "programs": [_part_json(part, iteration.place) for part in iteration.parts],
        "iteration": {
            "complete": all(part.found is not None for part in iteration.parts),
            "cycles": iteration.cycles,
            "collectives": [dataclasses.asdict(total) for total in collectives.totals(iteration.collectives())],
            "peak_bytes": None if largest is None else largest.bytes,
            "peak_program": None if largest is None else largest.name,
            "fits": not iteration.problems,
        },
        **({} if iteration.time is None else {"estimate": report_time.iteration_json(iteration.time)}),
        "versions": report.versions(),
    }


def _part_json(part: Part, place: Place) -> dict[str, Any]:
    head = {"program": part.name, "times": part.times, "fits": part.fits(place), "problem": part.trouble(place)}
    if part.found is None:
        return head
    return head | {"beside_bytes": part.beside_bytes} | report.program_json(*part.found)


def to_text(iteration: Iteration, *, details: bool = False) -> str:
    """The table that `plan` prints: a section for each program, and the iteration."""
    seconds = sum(part.found[0].compile_seconds for part in iteration.parts if part.found is not None)
    lines = [
        f"{iteration.program} iteration on {report.where(iteration.place)}",
        f"{report.labelled(seconds)}, for one device; nothing was run.",
        *report.notes(iteration.place),
        *iteration.facts,
    ]
    for part in iteration.parts:
        often = "once" if part.times == 1 else f"{part.times} times"
        lines += ["", f"== {part.name}: {part.does}, {often} an iteration"]
        if part.problem:
            lines.append(part.problem)
        if part.found is not None:
            compiled, cost, time = part.found
            trouble, beside = part.trouble(iteration.place), part.beside_bytes
            lines += report.program_lines(
                compiled, cost, iteration.place, time, details=details, problem=trouble, beside_bytes=beside
            )
    return "\n".join(line.rstrip() for line in [*lines, "", *_sums(iteration)])


def _sums(iteration: Iteration) -> list[str]:
    cycles = iteration.cycles
    rows = [{"name": "== iteration", "times": "times", "cycles": "cycles", "share": "share", "memory": "memory"}]
    for part in iteration.parts:
        row = {"name": f"  {part.name}", "times": str(part.times), "cycles": "?", "share": "?"}
        row["memory"] = "does not fit"
        if part.found is not None:
            spent = part.times * part.found[1].cycles
            row["cycles"], row["share"] = f"{spent:.4g}", f"{spent / max(cycles, 1):.1%}"
            row["memory"] = f"{format_bytes(part.bytes or 0)} {'' if part.fits(iteration.place) else 'does not fit'}"
        rows.append(row)
    largest = iteration.largest
    peak = "?" if largest is None else format_bytes(largest.bytes or 0)
    verdict = "does not fit" if iteration.problems else "fits"
    rows.append({"name": "  together", "times": "", "cycles": f"{cycles:.4g}", "share": "", "memory": peak})
    lines = report.table(rows, right=("times", "cycles", "share"))
    if iteration.time is not None:
        lines = [*lines, *report_time.iteration_lines(iteration.time)]
    lines.append(f"  {verdict} into {format_bytes(iteration.place.hbm_bytes)} of a device")
    return [*lines, "", *report.collective_lines(iteration.collectives())]
