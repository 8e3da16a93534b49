"""Successive halving (arXiv 1502.07943): all members run a little, the better ones go on, to more and more steps.

Pure functions of steps and values. A rung ends at a step, where every member evaluates and saves: decisions depend on
neither the order of runs nor how many run at once, and a member that was stopped goes on from there if it is promoted.
"""

import math
import re
from collections.abc import Mapping

from launch.sweeps.index import Decision
from launch.sweeps.results import rank
from t5x_like.core.errors import UsageError


def parse(text: str) -> tuple[int, int]:
    """`--halving=SHARE:STEPS`: 1 in SHARE members goes on at each rung, the first of which ends after STEPS.

    >>> parse("2:100")
    (2, 100)
    """
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    share, steps = map(int, found.groups()) if found else (0, 0)
    if share < 2 or steps < 1:
        raise UsageError(
            f"--halving={text} should be SHARE:STEPS, such as 2:100: half go on after 100 steps, and so on"
        )
    return share, steps


def rungs(halving: tuple[int, int], members: int, steps: int) -> list[int]:
    """The steps after which members are stopped, each so many times those before; the whole run is none of them.

    >>> rungs((2, 100), 8, 1000)
    [100, 200, 400]
    """
    share, first = halving
    found = []
    while members > 1 and first < steps:
        found.append(first)
        first *= share
        members = max(1, members // share)
    return found


def decide(values: Mapping[str, float | None], *, steps: int, share: int, metric: str, goal: str) -> Decision:
    """Who goes on: 1 in `share`, at least one; of equal values those that come first. What is no number ranks last."""
    ranking = sorted(values, key=lambda name: rank(values[name], goal))
    numbers = [name for name in ranking if not rank(values[name], goal)[0]]
    if not numbers:
        first = next(iter(values))
        raise UsageError(f"no member has a finite {metric} after {steps} steps; the member {first} has {values[first]}")
    promoted = tuple(numbers[: max(1, len(values) // share)])
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
    return Decision(steps, metric, tuple((name, finite[name]) for name in ranking), promoted)
