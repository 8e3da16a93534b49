"""What of the collectives and copies is exposed: the schedule of a program played through, with a clock.

A collective is in flight from the instruction that begins it to the one that waits for it. What is not over by then
is exposed: nothing is computed meanwhile. Those that need the same links take their turns. A loop's turn is played once
and counts as often as the loop runs. Not here: what an instruction takes (kernels.py, network.py).
"""

import dataclasses
from collections.abc import Callable

from t5x_like.planner.time.collectives import Collective
from t5x_like.planner.time.network import Trip
from t5x_like.planner.time.schedule import Block, Copy, Op


@dataclasses.dataclass(frozen=True)
class Flight:
    """A collective or copy of a program. collective: with its count, None for a copy. seconds: of all executions, of
    which `exposed` are not overlapped."""

    op: Op
    collective: Collective | None
    network: str
    seconds: float
    exposed: float


def play(
    schedule: Block,
    *,
    work: Callable[[Op], float],
    transfer: Callable[[Collective | Copy], Trip],
) -> list[Flight]:
    """All of a program. work: seconds of what an instruction computes."""
    flights: list[Flight] = []
    _play(schedule, 1, work, transfer, flights)
    return flights


def _play(block: Block, times: int, work: Callable, transfer: Callable, flights: list[Flight]) -> float:
    """Adds the flights of a block that is entered `times` times; seconds of one entry."""
    runs = times * block.times
    now, free, flying = 0.0, {}, {}

    def land(key: str) -> None:
        nonlocal now
        for op, what, network, took, lands in flying.pop(key, ()):
            exposed = max(0.0, lands - now)
            now += exposed
            counted = dataclasses.replace(what, count=what.count * runs) if isinstance(what, Collective) else None
            flights.append(Flight(op, counted, network, runs * took, runs * exposed))

    for item in block.items:
        if isinstance(item, Block):
            now += _play(item, runs, work, transfer, flights)
            continue
        for begun in item.begins:
            trip = transfer(begun.what)
            took = trip.seconds * (begun.what.count if isinstance(begun.what, Collective) else 1)
            lands = max(now, *(free.get(lane, 0.0) for lane in trip.lanes), 0.0) + took
            free |= dict.fromkeys(trip.lanes, lands)
            flying.setdefault(begun.key, []).append((item, begun.what, trip.network, took, lands))
        now += work(item)
        for key in item.ends:
            land(key)
    for key in list(flying):  # begun and not waited for here
        land(key)
    return now * block.times
