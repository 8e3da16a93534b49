"""Standard errors of metrics and of paired differences: in closed form for means, else from a seeded bootstrap.

The difference of two models is taken document by document, so that what makes documents hard for both cancels
(arXiv 2411.00640, section 4).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from t5x_like.evaluation.results import Aggregate, Item, Metric

RESAMPLES = 1000
_SEED = 1234


@dataclasses.dataclass(frozen=True)
class Difference:
    """value: `other` minus `reference` over the documents that both have; error: its paired standard error."""

    task: str
    name: str
    filter: str
    value: float
    error: float | None
    documents: int
    higher_is_better: bool | None

    @property
    def worse_by(self) -> float | None:
        """How much worse `other` is, negative where it is better; None where no direction is known."""
        if self.higher_is_better is None:
            return None
        return -self.value if self.higher_is_better else self.value

    def is_worse(self, errors: float) -> bool:
        """Whether it is worse by more than so many standard errors; without a standard error, by anything."""
        worse_by = self.worse_by
        return worse_by is not None and worse_by > errors * (self.error or 0.0)


def mean(items: Sequence[Item]) -> float:
    """The one aggregate whose standard errors have a closed form."""
    return float(np.mean(np.asarray(items, np.float64)))


def error(items: Sequence[Item], aggregate: Aggregate) -> float | None:
    """The standard error of aggregate(items), None of a single document."""
    if len(items) < 2:
        return None
    if aggregate is mean:
        return _error_of_mean(np.asarray(items, np.float64))
    return _spread([aggregate([items[i] for i in chosen]) for chosen in _resamples(len(items))])


def difference(reference: Metric, other: Metric) -> Difference | None:
    """None where they share no document."""
    place = {document: index for index, document in enumerate(reference.documents)}
    shared = [(place[document], index) for index, document in enumerate(other.documents) if document in place]
    if not shared:
        return None
    before, after = [reference.items[i] for i, _ in shared], [other.items[j] for _, j in shared]
    aggregate = other.aggregate
    found: float | None = None
    if len(shared) > 1 and aggregate is mean:
        found = _error_of_mean(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    elif len(shared) > 1:
        found = _spread(
            [
                aggregate([after[i] for i in chosen]) - aggregate([before[i] for i in chosen])
                for chosen in _resamples(len(shared))
            ]
        )
    value = aggregate(after) - aggregate(before)
    return Difference(other.task, other.name, other.filter, value, found, len(shared), other.higher_is_better)


def differences(reference: Sequence[Metric], other: Sequence[Metric]) -> list[Difference]:
    """Of all metrics that both have, in the order of the second."""
    known = {metric.key: metric for metric in reference}
    pairs = [(known[metric.key], metric) for metric in other if metric.key in known]
    return [found for pair in pairs if (found := difference(*pair)) is not None]


def _error_of_mean(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _resamples(count: int) -> list[list[int]]:
    generator = np.random.default_rng(_SEED)
    return [generator.integers(0, count, count).tolist() for _ in range(RESAMPLES)]


def _spread(values: Sequence[float]) -> float | None:
    found = float(np.std(np.asarray(values, np.float64), ddof=1))
    return found if math.isfinite(found) else None
