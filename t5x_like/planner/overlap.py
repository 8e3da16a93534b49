"""What of the collectives is exposed: the schedule of a program played through, with a clock.

A collective is in flight from the instruction that begins it to the one that waits for it. What is not over by then
is exposed: nothing is computed meanwhile. Collectives of one network take their turns. A loop's turn is played once
and counts as often as the loop runs. Not here: what an instruction takes (kernels.py, network.py).
"""

import dataclasses
from collections.abc import Callable

from t5x_like.planner.collectives import Collective
from t5x_like.planner.schedule import Block, Op


@dataclasses.dataclass(frozen=True)
class Flight:
    """A collective instruction of a program. seconds: of all its executions, of which `exposed` are not overlapped."""

    op: Op
    collective: Collective
    network: str
    seconds: float
    exposed: float


def play(
    schedule: Block,
    *,
    work: Callable[[Op], float],
    transfer: Callable[[Collective], tuple[str, float]],
) -> list[Flight]:
    """All collectives of a program. work: seconds of what an instruction computes; transfer: (network, seconds)."""
    flights: list[Flight] = []
    _play(schedule, 1, work, transfer, flights)
    return flights


def _play(block: Block, times: int, work: Callable, transfer: Callable, flights: list[Flight]) -> float:
    """Adds the flights of a block that is entered `times` times; seconds of one entry."""
    runs = times * block.times
    now, free, flying = 0.0, {}, {}

    def land(key: str) -> None:
        nonlocal now
        for op, collective, network, took, lands in flying.pop(key, ()):
            exposed = max(0.0, lands - now)
            now += exposed
            counted = dataclasses.replace(collective, count=collective.count * runs)
            flights.append(Flight(op, counted, network, runs * took, runs * exposed))

    for item in block.items:
        if isinstance(item, Block):
            now += _play(item, runs, work, transfer, flights)
            continue
        for begun in item.begins:
            network, each = transfer(begun.collective)
            took = each * begun.collective.count
            lands = max(now, free.get(network, 0.0)) + took
            free[network] = lands
            flying.setdefault(begun.key, []).append((item, begun.collective, network, took, lands))
        now += work(item)
        for key in item.ends:
            land(key)
    for key in list(flying):  # begun and not waited for here
        land(key)
    return now * block.times
