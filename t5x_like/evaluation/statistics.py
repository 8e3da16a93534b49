"""Standard errors of metrics and of paired differences: in closed form for means, else from a seeded bootstrap.

The difference of two models is taken document by document, so that what makes documents hard for both cancels
(arXiv 2411.00640, section 4).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from t5x_like.evaluation.results import Aggregate, Item, Metric

RESAMPLES = 1000
_SEED = 1234


@dataclasses.dataclass(frozen=True)
class Difference:
    """value: `other` minus `reference` over the documents that both have; error: its paired standard error.

    A value of `other` that is no number makes this one NaN, and counts as worse; against a reference that is none, any
    number is better by infinity. Two equal infinities differ by 0.
    """

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
        return worse_by is not None and not worse_by <= errors * (self.error or 0.0)


def mean(items: Sequence[Item]) -> float:
    """The one aggregate whose standard errors have a closed form."""
    return float(np.mean(np.asarray(items, np.float64)))


@dataclasses.dataclass(frozen=True)
class RatioOfSums:
    """An aggregate of items (top, bottom): `finish` of the sum of tops over the sum of bottoms. Reads arrays too, so
    that a bootstrap of it needs no Python objects."""

    finish: Callable[[float], float]

    def __call__(self, items: Sequence[Item] | np.ndarray) -> float:
        top, bottom = np.asarray(items, np.float64).sum(axis=0).tolist()
        return self.finish(top / bottom if bottom else math.nan)


def error(items: Sequence[Item], aggregate: Aggregate) -> float | None:
    """The standard error of aggregate(items), None of a single document and where it is no finite number."""
    if len(items) < 2:
        return None
    if aggregate is mean:
        return _error_of_mean(np.asarray(items, np.float64))
    of = _chosen(items, aggregate)
    return _spread([of(chosen) for chosen in _resamples(len(items))])


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
        with np.errstate(invalid="ignore"):
            found = _error_of_mean(np.asarray(after, np.float64) - np.asarray(before, np.float64))
    elif len(shared) > 1:
        first, second = _chosen(before, aggregate), _chosen(after, aggregate)
        found = _spread([second(chosen) - first(chosen) for chosen in _resamples(len(shared))])
    value = _change(aggregate(before), aggregate(after), other.higher_is_better)
    return Difference(other.task, other.name, other.filter, value, found, len(shared), other.higher_is_better)


def _change(before: float, after: float, higher_is_better: bool | None) -> float:
    if before == after:  # infinities too
        return 0.0
    if math.isnan(before) and not math.isnan(after) and higher_is_better is not None:
        return math.inf if higher_is_better else -math.inf
    return after - before


def differences(reference: Sequence[Metric], other: Sequence[Metric]) -> list[Difference]:
    """Of all metrics that both have, in the order of the second."""
    known = {metric.key: metric for metric in reference}
    pairs = [(known[metric.key], metric) for metric in other if metric.key in known]
    return [found for pair in pairs if (found := difference(*pair)) is not None]


def _error_of_mean(values: np.ndarray) -> float | None:
    with np.errstate(invalid="ignore"):
        return _finite(float(values.std(ddof=1) / math.sqrt(len(values))))


def _chosen(items: Sequence[Item], aggregate: Aggregate) -> Callable[[np.ndarray], float]:
    """The aggregate of a resample, given as indices. Resamples are made one at a time: memory is that of the items."""
    if isinstance(aggregate, RatioOfSums):
        array = np.asarray(items, np.float64)
        return lambda chosen: aggregate(array[chosen])
    return lambda chosen: aggregate([items[i] for i in chosen.tolist()])


def _resamples(count: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(_SEED)
    for _ in range(RESAMPLES):
        yield generator.integers(0, count, count)


def _spread(values: Sequence[float]) -> float | None:
    with np.errstate(invalid="ignore"):
        return _finite(float(np.std(np.asarray(values, np.float64), ddof=1)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
