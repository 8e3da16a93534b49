"""A plan as text for people and as JSON for programs. It formats; what stands in it comes from compile.py and cost.py.

All figures are of one device and one step, and all are the compiler's estimates.
"""

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes
from t5x_like.planner import collectives
from t5x_like.planner.compile import Compiled
from t5x_like.planner.cost import Cost


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a compiled program. `program` is "train" or "decode"; mesh: {axis: size} in mesh order."""

    program: str
    topology: str
    chips: int
    mesh: dict[str, int]
    compiled: Compiled
    cost: Cost


def to_json(plan: Plan) -> dict[str, Any]:
    """The content of `plan --json`. Later versions add keys."""
    memory = plan.compiled.memory
    return {
        "program": plan.program,
        "topology": plan.topology,
        "chips": plan.chips,
        "mesh": plan.mesh,
        "memory": {**dataclasses.asdict(memory), "total_bytes": memory.total_bytes},
        "cycles": plan.cost.cycles,
        "collectives": [dataclasses.asdict(total) for total in collectives.totals(plan.cost.collectives)],
        "collective_instructions": [dataclasses.asdict(item) for item in plan.cost.collectives],
        "kernels": [dataclasses.asdict(kernel) for kernel in plan.cost.kernels],
        "without_estimate": plan.cost.without_estimate,
        "unknown_loops": list(plan.cost.unknown_loops),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "lower_seconds": round(plan.compiled.lower_seconds, 1),
        "compile_seconds": round(plan.compiled.compile_seconds, 1),
    }


def to_text(plan: Plan, *, details: bool = False) -> str:
    """The table that `plan` prints; with `details` every collective instruction by itself."""
    memory, cost = plan.compiled.memory, plan.cost
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{plan.program} step on {plan.topology}: {plan.chips} chips, mesh {mesh}",
        f"Estimates of the TPU compiler (libtpu {importlib.metadata.version('libtpu')}, "
        f"{plan.compiled.compile_seconds:.0f} s), for one device and one step; nothing was run.",
        "",
        "memory (HBM)",
        f"  arguments    {_bytes(memory.arguments_bytes)}",
        f"  temporaries  {_bytes(memory.temporaries_bytes)}",
        f"  outputs      {_bytes(memory.outputs_bytes)}   {format_bytes(memory.aliased_bytes)} in place of arguments",
        f"  together     {_bytes(memory.total_bytes)}",
        "",
        f"cycles         {cost.cycles:.4g}, without collectives and the kernels below",
        *(f"  kernel       {kernel.name} x {kernel.count}" for kernel in cost.kernels),
        *_caveats(cost),
        "",
        *_collectives(cost.collectives, details=details),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _bytes(size: int) -> str:
    return f"{format_bytes(size):>10} {size:>18,}"


def _caveats(cost: Cost) -> list[str]:
    lines = []
    if cost.without_estimate:
        listed = ", ".join(f"{name} x {count}" for name, count in cost.without_estimate.items())
        lines.append(f"  not counted  {listed}: the compiler gives no estimate")
    if cost.unknown_loops:
        lines.append(f"  counted once {', '.join(cost.unknown_loops)}: loops whose length depends on data")
    return lines


def _collectives(items: Sequence[collectives.Collective], *, details: bool) -> list[str]:
    if not items:
        return ["collectives    none"]
    header = {"kind": "collectives", "axes": "axes", "group": "devices", "count": "count", "bytes": "bytes"}
    rows = [header, *(_row(total, total.bytes) for total in collectives.totals(items))]
    lines = _table(rows)
    if details:
        header = header | {"kind": "each instruction", "bytes": "bytes each", "source": "from"}
        largest = sorted(items, key=lambda item: -item.count * item.bytes_each)
        rows = [header, *({**_row(item, item.bytes_each), "source": item.source} for item in largest)]
        lines += ["", *_table(rows)]
    return lines


def _row(item: collectives.Total | collectives.Collective, size: int) -> dict[str, str]:
    return {
        "kind": f"  {item.kind}",
        "axes": " x ".join(item.axes) or "none",
        "group": str(item.group_size),
        "count": str(item.count),
        "bytes": f"{format_bytes(size)} {size:,}",
    }


def _table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Columns as wide as their longest cell; numbers to the right."""
    widths = {column: max(len(row[column]) for row in rows) for column in rows[0]}
    right = ("group", "count", "bytes")
    return [
        "  ".join(
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in row.items()
        )
        for row in rows
    ]
