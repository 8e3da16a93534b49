"""Fits a few constants of the plan's estimate to published step times; says how it does on rows that it did not see.

Least squares of log(estimated / published) over rows, by Gauss-Newton steps on the logs of the constants, each held
within its bounds. A weak pull to the start (PULL) keeps constants that no row determines where they were. No jax, no
knowledge of what is fitted: `seconds` maps (row number, constants) to an estimate.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

PULL = 0.05  # weight of a constant's distance from its start, beside rows' errors
STEPS = 8
NUDGE = 0.02  # of a constant's log, for its derivative


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number to be fitted. start: where the fit begins and is drawn to; low, high: bounds."""

    name: str
    start: float
    low: float
    high: float


Seconds = Callable[[int, Mapping[str, float]], float]


def fit(
    constants: Sequence[Constant], published: Sequence[float], seconds: Seconds, *, rows: Sequence[int] | None = None
) -> dict[str, float]:
    """The constants that bring the rows' estimates closest to what is published; rows: all where None."""
    chosen = range(len(published)) if rows is None else rows
    names = [constant.name for constant in constants]
    start = np.log([constant.start for constant in constants])
    low, high = (np.log([getattr(constant, end) for constant in constants]) for end in ("low", "high"))
    logs = start.copy()

    def residuals(at: np.ndarray) -> np.ndarray:
        values = dict(zip(names, np.exp(at), strict=True))
        errors = [math.log(seconds(row, values) / published[row]) for row in chosen]
        return np.concatenate([errors, PULL * (at - start)])

    best = residuals(logs)
    for _ in range(STEPS):
        slope = np.stack([(residuals(logs + NUDGE * unit) - best) / NUDGE for unit in np.eye(len(logs))], axis=1)
        step = np.linalg.lstsq(slope, -best, rcond=None)[0]
        for shorter in (1.0, 0.5, 0.25, 0.1):
            tried = np.clip(logs + shorter * step, low, high)
            found = residuals(tried)
            if found @ found < best @ best:
                break
        else:
            break
        moved, logs, best = np.abs(tried - logs).max(), tried, found
        if moved < 1e-3:
            break
    return {name: float(value) for name, value in zip(names, np.exp(logs), strict=True)}


def errors(published: Sequence[float], seconds: Seconds, values: Mapping[str, float]) -> list[float]:
    """estimated / published - 1 of each row."""
    return [seconds(row, values) / time - 1 for row, time in enumerate(published)]


def leave_one_out(constants: Sequence[Constant], published: Sequence[float], seconds: Seconds) -> list[float]:
    """The error of each row by constants that are fitted to all other rows."""
    found = []
    for row, time in enumerate(published):
        others = [other for other in range(len(published)) if other != row]
        values = fit(constants, published, seconds, rows=others)
        found.append(seconds(row, values) / time - 1)
    return found
