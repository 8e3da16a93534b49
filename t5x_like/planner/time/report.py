"""The estimate of a step's time, as text for people and as JSON for programs; what stands in it: estimate.py."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_like.core.terminal import format_bytes, format_count
from t5x_like.planner.time import regions
from t5x_like.planner.time.collectives import Collective
from t5x_like.planner.time.estimate import PARTS, Estimate, IterationTime
from t5x_like.planner.time.overlap import Flight


def to_json(estimate: Estimate) -> dict[str, Any]:
    """Keys of a plan: regions, kernels, collectives, operations, estimate. Seconds are of the program, once."""
    return {
        "regions": [
            {
                "region": region,
                "pass": which,
                "cycles": each.cycles,
                "seconds": each.seconds,
                "exposed_seconds": each.exposed,
                "waiting_seconds": each.waiting,
                "flops": each.flops,
            }
            for (region, which), each in estimate.regions.items()
        ],
        "kernels": [
            {
                "name": kernel.name,
                "region": kernel.region,
                "pass": kernel.which,
                "count": kernel.count,
                "flops": kernel.flops,
                "seconds": kernel.seconds,
            }
            for kernel in estimate.kernels
        ],
        "collectives": [dataclasses.asdict(total) for total in totals(estimate)],
        "collective_instructions": [
            _flight_json(flight, flight.collective) for flight in estimate.flights if flight.collective is not None
        ],
        "operations": [
            {
                "name": one.op.name,
                "source": one.op.source,
                "count": one.count,
                "seconds": one.seconds,
                "flops": one.flops,
            }
            for one in estimate.operations
        ],
        "estimate": _estimate_json(estimate),
    }


def _flight_json(flight: Flight, item: Collective) -> dict[str, Any]:
    facts = {name: value for name, value in dataclasses.asdict(item).items() if name != "devices"}
    return facts | {
        "seconds": flight.seconds,
        "exposed_seconds": flight.exposed,
        "asynchronous": flight.between is not None,
        "instructions_between": flight.between,
        "computing_seconds_between": flight.beside,
    }


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    work, price = estimate.work, estimate.price
    return {
        "step_seconds": estimate.step_seconds,
        "parts": dict(estimate.parts),
        "exposed": dict(estimate.exposed),
        "exposed_step_seconds": estimate.exposed_step_seconds,
        "compiler_seconds": estimate.compiler_seconds,
        "incomplete": list(estimate.incomplete),
        "constants": dict(estimate.constants),
        "bound_by": estimate.bound_by,
        "model_flops": None if work is None else work.model_flops,
        "model_flops_full_attention": None if work is None else work.full_flops,
        "hardware_flops": estimate.hardware_flops,
        "mfu": estimate.mfu,
        "mfu_full_attention": estimate.mfu_full_attention,
        "hfu": estimate.hardware_utilisation,
        "tokens": None if work is None else work.tokens,
        "tokens_per_second": estimate.tokens_per_second,
        "run_seconds": estimate.run_seconds,
        "chip_hours": estimate.chip_hours,
        "cost": estimate.cost,
        "cost_per_million_tokens": estimate.cost_per_million_tokens,
        "currency": None if price is None else price.currency,
    }


def iteration_json(time: IterationTime) -> dict[str, Any]:
    return {
        "iteration_seconds": time.seconds,
        "parts": time.parts,
        "bound_by": time.bound_by,
        "run_seconds": time.run_seconds,
        "chip_hours": time.chip_hours,
        "cost": time.cost,
        "currency": None if time.price is None else time.price.currency,
    }


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of a step that are of one kind, over the same axes, groups and network."""

    kind: str
    axes: tuple[str, ...]
    group_size: int
    network: str
    count: int
    bytes: int
    seconds: float
    exposed_seconds: float


def totals(estimate: Estimate) -> list[Total]:
    """Longest first."""
    found: dict[tuple, Total] = {}
    for flight in estimate.flights:
        item = flight.collective
        if item is None:
            continue
        key = (item.kind, item.axes, item.group_size, flight.network)
        before = found.get(key) or Total(*key, 0, 0, 0.0, 0.0)
        found[key] = dataclasses.replace(
            before,
            count=before.count + item.count,
            bytes=before.bytes + item.count * item.bytes_each,
            seconds=before.seconds + flight.seconds,
            exposed_seconds=before.exposed_seconds + flight.exposed,
        )
    return sorted(found.values(), key=lambda total: (-total.seconds, -total.bytes))


# The table.


def lines(estimate: Estimate) -> list[str]:
    """The section of the table that `plan` prints: time, its parts, what follows, and regions by pass."""
    found = [f"time           {seconds(estimate.step_seconds)} a step, estimated; bound by {estimate.bound_by}"]
    for name, spent in estimate.parts.items():
        beside = ""
        if name == "compute":
            beside = f"   {seconds(estimate.compiler_seconds)} by the compiler's cycles"
        elif estimate.exposed.get(name, 0.0) > spent:
            beside = f"   of {seconds(estimate.exposed[name])} that the schedule leaves exposed"
        if spent > 0:
            share = f"{spent / max(estimate.step_seconds, 1e-30):6.1%}"
            found.append(f"  {PARTS[name]:<21}{seconds(spent):>9}  {share}{beside}")
    if estimate.exposed_step_seconds > 1.01 * estimate.step_seconds:
        found.append(f"  or {seconds(estimate.exposed_step_seconds)}, if a step waits for all that is exposed")
    if estimate.incomplete:
        found.append(f"  without      {', '.join(estimate.incomplete)}: no time is known, so a step takes longer")
    if estimate.mfu is not None and estimate.mfu_full_attention is not None:
        found.append(
            f"  MFU {estimate.mfu:.1%}, or {estimate.mfu_full_attention:.1%} with attention counted in full; "
            f"with what is computed again (HFU) {estimate.hardware_utilisation or 0:.1%}"
        )
    found.append(_flops(estimate))
    if estimate.tokens_per_second is not None:
        found.append(f"  {format_count(estimate.tokens_per_second)} tokens a second{_run(estimate)}")
    if estimate.cost_per_million_tokens is not None and estimate.price is not None:
        found.append(f"  a million tokens cost {_amount(estimate.cost_per_million_tokens)} {estimate.price.currency}")
    return [*found, "", *_region_lines(estimate)]


def _flops(estimate: Estimate) -> str:
    """What a step needs by its mathematics, and what the program computes for it, over all devices."""
    computed = f"{format_count(estimate.hardware_flops)} are computed (hardware FLOPs)"
    if estimate.work is None or estimate.work.model_flops is None or estimate.work.full_flops is None:
        return f"  FLOPs of all devices: {computed}"
    model, full = (format_count(flops) for flops in (estimate.work.model_flops, estimate.work.full_flops))
    return f"  model FLOPs {model} a step, {full} with attention counted in full; {computed}"


def iteration_lines(time: IterationTime) -> list[str]:
    parts = ", ".join(f"{name} {seconds(spent)}" for name, spent in time.parts.items())
    return [f"  time         {seconds(time.seconds)} an iteration, estimated: {parts}{_run(time)}"]


def _run(found: Estimate | IterationTime) -> str:
    if found.run_seconds is None or found.chip_hours is None:
        return ""
    cost = "" if found.cost is None or found.price is None else f", {_amount(found.cost)} {found.price.currency}"
    return f"; the run takes {_long(found.run_seconds)}, {_amount(found.chip_hours)} chip-hours{cost}"


def _amount(value: float) -> str:
    """
    >>> _amount(50400.4), _amount(12.345), _amount(0.000123)
    ('50,400', '12.3', '0.00012')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def cycle_lines(estimate: Estimate) -> list[str]:
    """The compiler's cycles of each region by pass."""
    spent = estimate.regions
    names, passes = _named(estimate)
    rows = [["cycles", *(which or "no pass" for which in passes), "together"]]
    for name in names:
        each = [spent[name, which].cycles if (name, which) in spent else 0 for which in passes]
        if sum(each):
            rows.append([f"  {name}", *(f"{cycles:.4g}" if cycles else "-" for cycles in each), f"{sum(each):.4g}"])
    total = sum(one.cycles for one in spent.values())
    return [*columns(rows), f"  {total:.4g} together, without collectives and the kernels below"]


def _named(estimate: Estimate) -> tuple[list[str], list[str]]:
    """(regions, longest first; passes that a program has)."""
    spent = estimate.regions
    names = regions.sums((region, each.seconds + each.waiting) for (region, _), each in spent.items())
    return list(names), [name for name in (*regions.PASSES, "") if any(which == name for _, which in spent)]


def _region_lines(estimate: Estimate) -> list[str]:
    """Seconds of each region by pass, kernels included; then what it waits, and how much of the peak it reaches."""
    spent = estimate.regions
    names, passes = _named(estimate)
    rows = [["regions", *(which or "no pass" for which in passes), "together", "waiting", "of peak"]]
    device_peak = estimate.peak / estimate.devices
    for name in names:
        each = [spent.get((name, which)) for which in passes]
        found = [one for one in each if one is not None]
        together, waiting = sum(one.seconds for one in found), sum(one.waiting for one in found)
        reached = sum(one.flops for one in found) / max(together, 1e-30) / device_peak
        cells = [seconds(one.seconds) if one is not None and one.seconds else "-" for one in each]
        rows.append([f"  {name}", *cells, seconds(together), seconds(waiting) if waiting else "-", f"{reached:.0%}"])
    return columns(rows)


def kernel_lines(estimate: Estimate) -> list[str]:
    return [
        f"  kernel       {kernel.name} x {kernel.count} ({kernel.which or kernel.region}): "
        + ("unknown" if kernel.seconds is None else f"{seconds(kernel.seconds)}, assumed")
        for kernel in estimate.kernels
    ]


def collective_lines(estimate: Estimate) -> list[str]:
    if not any(flight.collective for flight in estimate.flights):
        return ["collectives    none"]
    rows = [["collectives", "axes", "over", "devices", "count", "bytes", "time", "exposed"]]
    for total in totals(estimate):
        axes, size = " x ".join(total.axes) or "none", f"{format_bytes(total.bytes)} {total.bytes:,}"
        times = (seconds(total.seconds), seconds(total.exposed_seconds))
        rows.append(
            [f"  {total.kind}", axes, total.network.upper(), str(total.group_size), str(total.count), size, *times]
        )
    return columns(rows, left=3)


def detail_lines(estimate: Estimate) -> list[str]:
    """The operations that compute longest, then every collective instruction, the most exposed first."""
    rows = [["longest operations", "region", "pass", "count", "time", "of peak", "from"]]
    for one in estimate.operations:
        region, which = regions.classify(one.op.source)
        reached = one.flops / max(one.seconds, 1e-30) / (estimate.peak / estimate.devices)
        cells = [f"  {one.op.name}", region, which, str(one.count), seconds(one.seconds), f"{reached:.0%}"]
        rows.append([*cells, one.op.source])
    lines = columns(rows, left=3, last=True)
    header = ["each collective", "axes", "over", "devices", "count", "bytes each", "time", "exposed"]
    rows = [[*header, "between", "beside", "from"]]  # start and done: instructions, and what is computed meanwhile
    for flight in sorted(estimate.flights, key=lambda flight: (-flight.exposed, -flight.seconds)):
        item = flight.collective
        if item is not None:
            cells = [f"  {item.kind}", " x ".join(item.axes) or "none", flight.network.upper(), str(item.group_size)]
            cells += [str(item.count), f"{format_bytes(item.bytes_each)} {item.bytes_each:,}"]
            cells += [seconds(flight.seconds), seconds(flight.exposed)]
            cells += ["-" if flight.between is None else str(flight.between), seconds(flight.beside)]
            rows.append([*cells, flight.op.source])
    if len(rows) == 1:
        return ["", *lines]
    said = "between: instructions from start to done, - for one that does both; beside: what is computed meanwhile"
    return ["", *lines, "", *columns(rows, left=3, last=True), f"  {said}"]


def columns(rows: Sequence[Sequence[str]], *, left: int = 1, last: bool = False) -> list[str]:
    """As wide as their longest cell; all but the first `left`, and the `last`, to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place < left or (last and place == len(widths) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def seconds(spent: float) -> str:
    """
    >>> seconds(2.8333), seconds(0.0123), seconds(45e-6)
    ('2.83 s', '12.3 ms', '45 us')
    """
    if spent >= 1:
        return f"{spent:.3g} s"
    return f"{spent * 1e3:.3g} ms" if spent >= 1e-3 else f"{spent * 1e6:.3g} us"


def _long(spent: float) -> str:
    """
    >>> _long(40.0), _long(9000.0), _long(1e6)
    ('40 seconds', '2.5 hours', '11.6 days')
    """
    for limit, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if spent >= limit:
            return f"{spent / limit:.3g} {unit}"
    return f"{spent:.3g} seconds"
