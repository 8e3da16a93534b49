"""What the outputs of stages say: paired differences of held-out scores with 95% intervals, shares, curves, samples.

A gain of a stage is a dict, by `kind`:
    paired  {"label", "report", "before" (report.json files of `t5x_like evaluate`), "metric", "tasks"}: the same
            documents before and after; of several tasks all documents together. "before_metric": that of `before`,
            where it has another name
    share   {"label", "metrics" (a metrics.jsonl), "metric", "records" (a JSONL file), "chance"}: a share of the
            held-out records of this file at the last evaluation, beside what guessing gives
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UserError

BITS = "bits_per_byte"
_NORMAL = 1.959964  # of 95%


@dataclasses.dataclass(frozen=True)
class Gain:
    """`difference`: after - before, with the ends of its 95% interval. sure: these are on one side of 0. count: of
    held-out documents; better: +1 where more is better, -1 where less is."""

    label: str
    count: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    better: int

    @property
    def verdict(self) -> str:
        if self.low <= 0 <= self.high:
            return "no change shown"
        return "better" if self.difference * self.better > 0 else "worse"


def gain(given: Mapping[str, Any]) -> Gain:
    """Raises UserError where an output lacks what is measured."""
    try:
        return {"paired": _paired, "share": _share}[given["kind"]](given)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"the gain {given.get('label')!r} cannot be read: {type(error).__name__}: {error}") from None


def items_of(report: str, metric: str, tasks: Sequence[str]) -> dict[str, Any]:
    """{task and document: what it contributes} of a report.json."""
    with open(report) as file:
        found = json.load(file)["models"][-1]["metrics"]
    items = {
        f"{each['task']} {document}": item
        for each in found
        if each["name"] == metric and each["task"] in tasks and each["filter"] == "none"
        for document, item in zip(each["documents"], each["items"], strict=True)
    }
    if lacking := [task for task in tasks if not any(key.startswith(f"{task} ") for key in items)]:
        raise UserError(f"{report} has no {metric} of {', '.join(lacking)}")
    return items


def value_of(items: Sequence[Any], metric: str) -> tuple[float, float]:
    """(value, standard error) of means, and of bits per byte, whose items are (log-probability, bytes)."""
    return _ratio(items, -math.log(2)) if metric == BITS else _mean(items)


def _paired(given: Mapping[str, Any]) -> Gain:
    metric, tasks = given["metric"], given["tasks"]
    before = items_of(given["before"], given.get("before_metric", metric), tasks)
    after = items_of(given["report"], metric, tasks)
    shared = [key for key in after if key in before]
    if len(shared) < 2:
        raise UserError(f"{given['before']} and {given['report']} share {len(shared)} documents of {', '.join(tasks)}")
    first, second = [before[key] for key in shared], [after[key] for key in shared]
    if metric == BITS:
        # The bytes of a block of text are the same for both, so the difference of the ratios is a ratio.
        change = [(new[0] - old[0], new[1]) for old, new in zip(first, second, strict=True)]
    else:
        change = [new - old for old, new in zip(first, second, strict=True)]
    difference, error = value_of(change, metric)
    width = _student(len(shared) - 1) * error
    values = value_of(first, metric)[0], value_of(second, metric)[0]
    better = -1 if metric == BITS else 1
    return Gain(given["label"], len(shared), *values, difference, difference - width, difference + width, better)


def _share(given: Mapping[str, Any]) -> Gain:
    value = [row[given["metric"]] for row in rows(given["metrics"]) if given["metric"] in row][-1]
    count, chance = len(rows(given["records"])), given["chance"]
    low, high = wilson(value, count)
    return Gain(given["label"], count, chance, value, value - chance, low - chance, high - chance, 1)


def rows(path: str) -> list[dict[str, Any]]:
    """Of a JSONL file."""
    with open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Both ends of Wilson's 95% interval (Wilson 1927), which a share of 0 or 1 has too.

    >>> [round(end, 4) for end in wilson(1.0, 20)]
    [0.8389, 1.0]
    """
    square = _NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _NORMAL / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return middle - half, min(1.0, middle + half)


def _mean(items: Sequence[float]) -> tuple[float, float]:
    count = len(items)
    mean = math.fsum(items) / count
    variance = math.fsum((item - mean) ** 2 for item in items) / max(count - 1, 1)
    return mean, math.sqrt(variance / count)


def _ratio(items: Sequence[tuple[float, float]], unit: float) -> tuple[float, float]:
    """Of sums, in `unit`; the error by linearisation (Cochran 1977, equation 2.46)."""
    count, bottom = len(items), math.fsum(item[1] for item in items)
    ratio = math.fsum(item[0] for item in items) / bottom
    square = math.fsum((top - ratio * below) ** 2 for top, below in items) * count / max(count - 1, 1)
    return ratio / unit, math.sqrt(square) / bottom / abs(unit)


def _student(freedom: int) -> float:
    """The quantile of Student's distribution for 95%, by its series (Abramowitz and Stegun 26.7.5).

    >>> round(_student(15), 2), round(_student(500), 2)
    (2.13, 1.96)
    """
    z = _NORMAL
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
