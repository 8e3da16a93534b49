"""Mixtures: how often each component is read, and which row of which component example number i is.

Rates follow SeqIO's rules; `Slots` turns them into a closed form. Which row a component gives for its index is the
permutation's business (data/read/permutation.py), and what a row holds is packing's.
"""

import dataclasses
import fractions
import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.data.config import MixtureConfig

_LONGEST_PERIOD = 1 << 18  # slots; rates that need more are rounded to a part in this many


@dataclasses.dataclass(frozen=True)
class Size:
    """What one epoch of a component holds. `tokens_per_row`: the length, or its mean where rows have padding."""

    examples: int
    tokens: int
    rows: int
    tokens_per_row: fractions.Fraction


def row_rates(
    config: MixtureConfig, sizes: Mapping[str, Size], stated: Mapping[str, float | None]
) -> dict[str, fractions.Fraction]:
    """{component: relative rate of its rows}: of the config, else as `stated` by a SeqIO mixture, else from sizes.

    Stated rates count examples. What makes rates from sizes is refused where there are others. A rate that counts
    examples (documents) is turned into one of rows by the mean number of examples in a row.
    """
    if config.counts not in ("examples", "tokens"):
        raise UsageError(f"config.data.mixture.counts={config.counts!r} should be examples or tokens")
    if not config.temperature > 0:
        raise UsageError(f"config.data.mixture.temperature={config.temperature} should be above 0")
    by_seqio = not config.rates and not config.sources and any(rate is not None for rate in stated.values())
    _check_unused(config, by_seqio=by_seqio)
    counts = config.counts
    if by_seqio:
        rates = {name: _exact(rate or 0.0, name) for name, rate in stated.items()}
    else:
        rates = _rates(config, sizes)
    if not any(rates.values()):
        raise UsageError("config.data.mixture.rates: all rates are 0")
    if counts == "tokens":
        return {name: rate / sizes[name].tokens_per_row for name, rate in rates.items() if rate}
    return {name: rate * sizes[name].rows / sizes[name].examples for name, rate in rates.items() if rate}


def _check_unused(config: MixtureConfig, *, by_seqio: bool) -> None:
    """UsageError for what makes rates from sizes, changed where the rates come from elsewhere."""
    if not (by_seqio or config.rates):
        return
    neutral = {"maximum": None, "scale": 1.0, "temperature": 1.0} | ({"counts": "examples"} if by_seqio else {})
    for name, value in neutral.items():
        if getattr(config, name) != value:
            rule, remedy = "config.data.mixture.rates decides", f"leave {name} at {value}"
            if by_seqio:
                rule, remedy = "the SeqIO mixture has its own rates", f"{remedy} or give config.data.mixture.rates"
            raise UsageError(
                f"config.data.mixture.{name}={getattr(config, name)} would have no effect: {rule}; {remedy}"
            )


def _rates(config: MixtureConfig, sizes: Mapping[str, Size]) -> dict[str, fractions.Fraction]:
    if not config.rates:
        return {name: _exact(_rate_of_size(config, size), name) for name, size in sizes.items()}
    for name in config.rates:
        if name not in sizes:
            raise UsageError(f"config.data.mixture.rates.{name}: no such source; {nearest(name, sizes)}")
    for name in sizes:
        if name not in config.rates:
            raise UsageError(f"config.data.mixture.rates lacks {name}; give every source a rate, or none")
    return {name: _exact(config.rates[name], name) for name in sizes}


def _rate_of_size(config: MixtureConfig, size: Size) -> float:
    """min(n * scale, maximum) ** (1 / temperature), as `seqio.mixing_rate_num_examples`."""
    rate = (size.examples if config.counts == "examples" else size.tokens) * config.scale
    rate = rate if config.maximum is None else min(rate, config.maximum)
    return rate if config.temperature == 1.0 else rate ** (1.0 / config.temperature)


def _exact(rate: float, name: str) -> fractions.Fraction:
    if not (math.isfinite(rate) and rate >= 0):
        raise UsageError(f"config.data.mixture.rates.{name}={rate} should be a number of at least 0")
    return fractions.Fraction(repr(rate))  # 1.009 is 1009/1000, as it was written


class Slots:
    """Which component and which index within it example i is, for rates as whole numbers `shares`.

    Among the first i examples, component c has less than one more or less than i * shares[c] / sum(shares), for
    every i: one period is laid out by earliest deadline first, each unit between the slots where it would be that
    much too early and too late (the windows of Pfair scheduling, Baruah et al. 1996), which one machine can always do.
    """

    def __init__(self, shares: Sequence[int]):
        self._shares = np.array(shares, np.int64)
        self._table = _period(list(shares))
        self._rank = np.zeros(len(self._table), np.int64)
        for component in range(len(shares)):
            slots = np.flatnonzero(self._table == component)
            self._rank[slots] = np.arange(len(slots))

    def locate(self, examples: Int[np.ndarray, "any"]) -> tuple[Int[np.ndarray, "any"], Int[np.ndarray, "any"]]:
        """(component, index within the component) of each example number.

        >>> [part.tolist() for part in Slots([2, 1]).locate(np.arange(6))]
        [[0, 0, 1, 0, 0, 1], [0, 1, 0, 2, 3, 1]]
        """
        periods, slots = np.divmod(examples, len(self._table))
        components = self._table[slots]
        return components, periods * self._shares[components] + self._rank[slots]


def shares(rates: Sequence[fractions.Fraction]) -> list[int]:
    """The rates as whole numbers without a common divisor; rounded, each to at least 1, where the sum is too long.

    >>> shares([fractions.Fraction("1"), fractions.Fraction("1.009"), fractions.Fraction("1")])
    [1000, 1009, 1000]
    """
    common = math.lcm(*(rate.denominator for rate in rates))
    whole = [int(rate * common) for rate in rates]
    divisor = math.gcd(*whole)
    whole = [number // divisor for number in whole]
    total = sum(whole)
    if total <= _LONGEST_PERIOD:
        return whole
    ideal = [fractions.Fraction(number * _LONGEST_PERIOD, total) for number in whole]
    rounded = [max(int(number), 1) for number in ideal]
    order = sorted(range(len(ideal)), key=lambda index: (rounded[index] - ideal[index], index))
    for index in order[: max(_LONGEST_PERIOD - sum(rounded), 0)]:
        rounded[index] += 1
    return rounded


def _period(shares: list[int]) -> np.ndarray:
    """[sum(shares)] of component numbers."""
    total = sum(shares)
    if len(shares) == 1:
        return np.zeros(total, np.int16)
    table = np.zeros(total, np.int16)
    waiting = [(0, component, 0) for component in range(len(shares))]  # (slot where it may begin, component, unit)
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # (last slot that is not too late, component, unit)
    for slot in range(total):
        while waiting and waiting[0][0] <= slot:
            _, component, unit = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(unit + 1) * total // shares[component]) - 1, component, unit))
        _, component, unit = heapq.heappop(ready)
        table[slot] = component
        if unit + 1 < shares[component]:
            heapq.heappush(waiting, ((unit + 1) * total // shares[component], component, unit + 1))
    return table
