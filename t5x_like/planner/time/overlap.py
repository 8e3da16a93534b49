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
    """A collective or copy of a program. collective: with its count, None for a copy.

    seconds: of all executions, of which `exposed` are not overlapped; beside: what is computed while it is in flight,
    of all executions too. between: instructions of the schedule between the one that begins it and the one that waits
    for it, a loop counting as one; None where one instruction does both, so that it is not asynchronous.
    """

    op: Op
    collective: Collective | None
    network: str
    seconds: float
    exposed: float
    between: int | None = None
    beside: float = 0.0


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


@dataclasses.dataclass(frozen=True)
class _Begun:
    """What is in flight: begun by instruction `number` of its block, when so much was computed; over at `lands`."""

    op: Op
    what: Collective | Copy
    trip: Trip
    seconds: float
    lands: float
    number: int
    computed: float


def _play(block: Block, times: int, work: Callable, transfer: Callable, flights: list[Flight]) -> tuple[float, float]:
    """Adds the flights of a block that is entered `times` times; seconds of one entry, and what of them computes."""
    runs = times * block.times
    now, computed, free, flying = 0.0, 0.0, {}, {}

    def land(key: str, number: int) -> None:
        nonlocal now
        for begun in flying.pop(key, ()):
            exposed = max(0.0, begun.lands - now)
            now += exposed
            what = begun.what
            counted = dataclasses.replace(what, count=what.count * runs) if isinstance(what, Collective) else None
            between = None if number == begun.number else number - begun.number - 1
            beside = runs * (computed - begun.computed)
            network, seconds = begun.trip.network, runs * begun.seconds
            flights.append(Flight(begun.op, counted, network, seconds, runs * exposed, between, beside))

    for number, item in enumerate(block.items):
        if isinstance(item, Block):
            elapsed, spent = _play(item, runs, work, transfer, flights)
            now, computed = now + elapsed, computed + spent
            continue
        for begun in item.begins:
            trip = transfer(begun.what)
            took = trip.seconds * (begun.what.count if isinstance(begun.what, Collective) else 1)
            lands = max(now, *(free.get(lane, 0.0) for lane in trip.lanes), 0.0) + took
            free |= dict.fromkeys(trip.lanes, lands)
            flying.setdefault(begun.key, []).append(_Begun(item, begun.what, trip, took, lands, number, computed))
        spent = work(item)
        now, computed = now + spent, computed + spent
        for key in item.ends:
            land(key, number)
    for key in list(flying):  # begun and not waited for here
        land(key, len(block.items))
    return now * block.times, computed * block.times
