"""A plan as text for people and as JSON for programs. It formats; what stands in it comes from compile.py and cost.py.

All figures are of one device and one step, and all are the compiler's estimates.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core import accelerators
from t5x_like.core.terminal import format_bytes
from t5x_like.parallel.pipeline import Schedule
from t5x_like.planner.compile import Compiled
from t5x_like.planner.memory import report as report_memory
from t5x_like.planner.memory.peak import Large
from t5x_like.planner.time import collectives
from t5x_like.planner.time import report as report_time
from t5x_like.planner.time.cost import Cost
from t5x_like.planner.time.estimate import Estimate
from t5x_like.planner.topology import compiler_version


@dataclasses.dataclass(frozen=True)
class Place:
    """Where programs are planned for. topology: of one slice; chips: of all; mesh: {axis: size} in mesh order;
    hbm_bytes: what a device has for programs; pipeline: what its stages do, None without stages."""

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    hbm_bytes: int
    pipeline: Schedule | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a compiled program, "train", "prefill" or "decode".

    problem: why it cannot run, or ""; facts: what it is of, for the head of the table.
    """

    program: str
    place: Place
    compiled: Compiled
    cost: Cost
    estimate: Estimate
    problem: str = ""
    facts: Sequence[str] = ()

    @property
    def problems(self) -> list[str]:
        return [self.problem] if self.problem else []


@dataclasses.dataclass(frozen=True)
class Refused:
    """A program that the compiler refuses for its size, and leaves no text of. largest: buffers, as far as it says."""

    program: str
    place: Place
    problem: str
    largest: Sequence[Large]

    @property
    def problems(self) -> list[str]:
        return [self.problem]


def refused_json(refused: Refused) -> dict[str, Any]:
    """The content of `plan --json` where nothing else is known."""
    head = {"program": refused.program, **place_json(refused.place), "fits": False, "problem": refused.problem}
    return head | {"largest": report_memory.buffers_json(refused.largest), "versions": versions()}


def refused_text(refused: Refused) -> str:
    lines = [f"{refused.program} step on {where(refused.place)}", *report_memory.buffer_lines(refused.largest)]
    return "\n".join([*lines, "nothing else is known: the compiler left no text of the program that it refused"])


def to_json(plan: Plan) -> dict[str, Any]:
    """The content of `plan --json`. Later versions add keys."""
    head = {"program": plan.program, **place_json(plan.place)}
    head |= {"fits": not plan.problem, "problem": plan.problem, "facts": list(plan.facts)}
    return head | program_json(plan.compiled, plan.cost, plan.estimate) | {"versions": versions()}


def place_json(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = dataclasses.asdict(place) | {"notes": notes(place)}
    if place.pipeline is None:
        return {name: value for name, value in found.items() if name != "pipeline"}
    return found | {"pipeline": found["pipeline"] | {"turns": place.pipeline.turns, "bubble": place.pipeline.bubble}}


def notes(place: Place) -> list[str]:
    """What is not as it would be there."""
    if place.slices > 1 and any(accelerators.wraps(accelerators.parse(place.topology).dims)):
        return [
            "libtpu compiles several slices as if their networks were no rings: within a slice all-gathers become "
            "all-reduces, which cost more; plan one slice for these"
        ]
    return []


def program_json(compiled: Compiled, cost: Cost, estimate: Estimate) -> dict[str, Any]:
    return {
        "memory": report_memory.to_json(compiled.memory, compiled.held),
        "cycles": cost.cycles,
        **report_time.to_json(estimate),
        "without_estimate": cost.without_estimate,
        "unknown_loops": list(cost.unknown_loops),
        "limited_loops": [dataclasses.asdict(loop) for loop in cost.limited_loops],
        "lower_seconds": round(compiled.lower_seconds, 1),
        "compile_seconds": round(compiled.compile_seconds, 1),
    }


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return found | {"libtpu": compiler_version()}


def to_text(plan: Plan, *, details: bool = False) -> str:
    """The table that `plan` prints; with `details` every collective instruction by itself."""
    lines = [
        f"{plan.program} step on {where(plan.place)}",
        f"{labelled(plan.compiled.compile_seconds)}, for one device and one step; nothing was run.",
        *notes(plan.place),
        *plan.facts,
        "",
        *program_lines(plan.compiled, plan.cost, plan.place, plan.estimate, details=details, problem=plan.problem),
    ]
    return "\n".join(line.rstrip() for line in lines)


def where(place: Place) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in place.mesh.items() if size > 1) or "one device"
    slices = f"{place.slices} x " if place.slices > 1 else ""
    pipeline = f", {place.pipeline.described}" if place.pipeline else ""
    return f"{slices}{place.topology}: {place.chips} chips, mesh {mesh}{pipeline}"


def labelled(seconds: float) -> str:
    """What the figures are, by whom; seconds: of compiling."""
    return f"Estimates of the TPU compiler (libtpu {compiler_version()}, {seconds:.0f} s)"


def program_lines(
    compiled: Compiled,
    cost: Cost,
    place: Place,
    estimate: Estimate,
    *,
    details: bool,
    problem: str = "",
    beside_bytes: int | None = None,
) -> list[str]:
    """Memory, time, cycles and collectives of one program. problem: why it cannot run, "" where it can; beside_bytes:
    what a device holds meanwhile besides."""
    verdict = report_memory.verdict(compiled.memory.total_bytes + (beside_bytes or 0), place.hbm_bytes, problem)
    return [
        *report_memory.lines(compiled.memory, compiled.held, verdict, beside_bytes=beside_bytes),
        "",
        *report_time.lines(estimate),
        "",
        *report_time.cycle_lines(estimate),
        *report_time.kernel_lines(estimate),
        *_caveats(cost),
        "",
        *report_time.collective_lines(estimate),
        *(report_time.detail_lines(estimate) if details else []),
    ]


def _caveats(cost: Cost) -> list[str]:
    lines = []
    if cost.without_estimate:
        listed = ", ".join(f"{name} x {count}" for name, count in cost.without_estimate.items())
        lines.append(f"  not counted  {listed}: the compiler gives no estimate")
    if cost.unknown_loops:
        lines.append(f"  counted once {', '.join(cost.unknown_loops)}: loops whose length depends on data")
    for loop in cost.limited_loops:
        each = f"{loop.cycles / max(loop.turns, 1):.4g}"
        lines.append(f"  loop         {loop.name} x {loop.turns}, its limit, which data may not reach: {each} a turn")
    return lines


_HEADER = {"kind": "collectives", "axes": "axes", "network": "over"}
_HEADER |= {"group": "devices", "count": "count", "bytes": "bytes"}


def collective_lines(items: Sequence[collectives.Collective]) -> list[str]:
    if not items:
        return ["collectives    none"]
    return table([_HEADER, *map(_row, collectives.totals(items))])


def _row(item: collectives.Total) -> dict[str, str]:
    return {
        "kind": f"  {item.kind}",
        "axes": " x ".join(item.axes) or "none",
        "network": item.network.upper(),
        "group": str(item.group_size),
        "count": str(item.count),
        "bytes": f"{format_bytes(item.bytes)} {item.bytes:,}",
    }


def table(rows: Sequence[Mapping[str, str]], *, right: Sequence[str] = ("group", "count", "bytes")) -> list[str]:
    """Columns as wide as their longest cell; those of numbers to the right."""
    widths = {column: max(len(row[column]) for row in rows) for column in rows[0]}
    return [
        "  ".join(
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in row.items()
        )
        for row in rows
    ]
