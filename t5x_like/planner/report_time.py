"""The estimate of a step's time, as text for people and as JSON for programs; what stands in it: estimate.py."""

import dataclasses
from typing import Any

from t5x_like.core.terminal import format_count
from t5x_like.planner import regions
from t5x_like.planner.cost import Cost
from t5x_like.planner.estimate import Estimate


def to_json(cost: Cost, estimate: Estimate) -> dict[str, Any]:
    """The keys "regions", "kernels", "collectives" and "estimate" of a plan. Seconds are of one execution."""
    return {
        "regions": _regions_json(cost, estimate),
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
        "estimate": {
            "step_seconds": estimate.step_seconds,
            "mfu": estimate.mfu,
            "mfu_full_attention": estimate.mfu_full_attention,
            "model_flops": None if estimate.work is None else estimate.work.model_flops,
            "hardware_flops": estimate.hardware_flops,
            "tokens_per_second": estimate.tokens_per_second,
            "run_seconds": estimate.run_seconds,
            "chip_hours": estimate.chip_hours,
            "cost": estimate.cost,
            "currency": None if estimate.price is None else estimate.price.currency,
            "bound_by": estimate.bound_by,
            "parts": dict(estimate.parts),
        },
    }


def lines(estimate: Estimate) -> list[str]:
    """The section of the table that `plan` prints."""
    parts = "  ".join(f"{name} {_seconds(spent)}" for name, spent in estimate.parts.items() if spent > 0)
    found = [f"time           {_seconds(estimate.step_seconds)} a step, estimated: {parts}"]
    if estimate.mfu is not None and estimate.mfu_full_attention is not None:
        found.append(
            f"  MFU          {estimate.mfu:.1%}; {estimate.mfu_full_attention:.1%} with full attention counted"
        )
        found.append(f"  tokens       {format_count(estimate.tokens_per_second or 0)} a second")
    if estimate.run_seconds is not None and estimate.chip_hours is not None:
        cost = "" if estimate.price is None else f", {estimate.cost:,.0f} {estimate.price.currency}"
        found.append(
            f"  run          {estimate.run_seconds / 86400:.3g} days, {estimate.chip_hours:,.0f} chip-hours{cost}"
        )
    return [*found, f"  bound by     {estimate.bound_by}"]


def _seconds(spent: float) -> str:
    """
    >>> _seconds(2.8333), _seconds(0.0123), _seconds(45e-6)
    ('2.83 s', '12.3 ms', '45 us')
    """
    if spent >= 1:
        return f"{spent:.3g} s"
    return f"{spent * 1e3:.3g} ms" if spent >= 1e-3 else f"{spent * 1e6:.3g} us"


def _regions_json(cost: Cost, estimate: Estimate) -> list[dict[str, Any]]:
    cycles = regions.by_region(cost.schedule)
    return [
        {"region": region, "pass": which, "cycles": cycles.get((region, which), 0), "seconds": seconds}
        for (region, which), seconds in estimate.regions.items()
    ]


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
