"""Points of a sweep: each a dict of overrides such as {"config.optim.learning_rate": 1e-3}; functions that make and
combine lists of them. All are pure: the same arguments give the same points on every machine and in every version.

    product(values("config.optim.learning_rate", [1e-3, 3e-3]), seeds(2))                     a grid, 4 points
    zipped(values("config.model.width", [64, 128]), values("config.optim.learning_rate", [3e-3, 1e-3]))
    chain(product(...), [{"config.optim.name": "muon"}])                                      one list after the other
    drawn(16, {"config.optim.learning_rate": log_uniform(1e-4, 1e-2)}, seed=0)                random search
    sobol(16, {"config.optim.learning_rate": log_uniform(1e-4, 1e-2), "config.model.dropout": uniform(0, 0.3)})

A distribution is its quantile function: it takes a number of [0, 1) to a value.
"""

import builtins
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from t5x_like.core.errors import UsageError

Point: TypeAlias = dict[str, Any]
Distribution: TypeAlias = Callable[[float], Any]

SEED = "config.seed"
_DIGITS = 4  # significant ones of a drawn number: more would be noise in every name, and no better a guess
_SOBOL_BITS = 30


def values(path: str, chosen: Iterable[Any]) -> list[Point]:
    """One point for each value of one field."""
    return [{path: value} for value in chosen]


def seeds(count: int, first: int = 0) -> list[Point]:
    return values(SEED, range(first, first + count))


def product(*sweeps: Sequence[Point]) -> list[Point]:
    """Every point of the first with every point of the next, and so on; the last changes fastest.

    >>> product(values("config.a", [1, 2]), values("config.b", [3]))
    [{'config.a': 1, 'config.b': 3}, {'config.a': 2, 'config.b': 3}]
    """
    return [_joined(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Point]) -> list[Point]:
    """The first points of all together, then the second ones. UsageError where they are not equally many."""
    if len({len(sweep) for sweep in sweeps}) > 1:
        counts = " and ".join(str(len(sweep)) for sweep in sweeps)
        raise UsageError(f"sweep: {counts} points cannot be zipped; give equally many values of each field")
    return [_joined(parts) for parts in builtins.zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Point]) -> list[Point]:
    """All points of the first, then all of the next."""
    return list(itertools.chain(*sweeps))


def uniform(low: float, high: float) -> Distribution:
    _check_range("uniform", low, high)
    return lambda part: _rounded(low + part * (high - low), low, high)


def log_uniform(low: float, high: float) -> Distribution:
    """Uniform in the logarithm: as many points between 1e-4 and 1e-3 as between 1e-3 and 1e-2."""
    _check_range("log_uniform", low, high)
    if low <= 0:
        raise UsageError(f"sweep: log_uniform({low:g}, {high:g}) needs a lower end above 0")
    return lambda part: _rounded(math.exp(math.log(low) + part * (math.log(high) - math.log(low))), low, high)


def integers(low: int, high: int) -> Distribution:
    """Whole numbers from low to high, both included."""
    _check_range("integers", low, high)
    if type(low) is not int or type(high) is not int:
        raise UsageError(f"sweep: integers({low}, {high}) needs whole numbers")
    return lambda part: low + int(part * (high - low + 1))


def choice(*options: Any) -> Distribution:
    if not options:
        raise UsageError("sweep: choice() needs something to choose from")
    return lambda part: options[int(part * len(options))]


def drawn(count: int, fields: Mapping[str, Distribution], *, seed: int = 0) -> list[Point]:
    """Different points drawn at random, each field by itself; fewer points are the beginning of more.

    random.Random.random() is the one generator that Python promises to keep as it is over its versions.
    """
    source = random.Random(seed)

    def parts() -> Iterator[list[float]]:
        while True:
            yield [source.random() for _ in fields]

    return _different(count, fields, parts(), what="drawn")


def sobol(count: int, fields: Mapping[str, Distribution], *, seed: int = 0) -> list[Point]:
    """Points of a Sobol sequence, which fill the space more evenly than random ones; best in powers of 2.

    Directions of Joe and Kuo (doi:10.1137/070709359) as SciPy has them; a seed shifts all points by one random number
    a field, digit by digit, which keeps them even and takes the first one off the corner.
    """
    # Imported here: it takes most of a second.
    from scipy.stats import qmc

    source = random.Random(seed)
    shift = [source.getrandbits(_SOBOL_BITS) for _ in fields]
    unit = 1 << _SOBOL_BITS

    def parts() -> Iterator[list[float]]:
        sequence = qmc.Sobol(len(fields), scramble=False, bits=_SOBOL_BITS)
        size = 64  # drawn in powers of 2, as the library wants it
        while True:
            for row in sequence.random(size):
                yield [(int(part * unit) ^ bits) / unit for part, bits in builtins.zip(row, shift, strict=True)]

    return _different(count, fields, parts(), what="sobol")


def key(point: Mapping[str, Any]) -> str:
    """Equal for equal points: 1 and 1.0 are one value, lists and tuples too."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps({path: plain(value) for path, value in point.items()}, sort_keys=True, default=repr)


def _different(
    count: int, fields: Mapping[str, Distribution], parts: Iterator[list[float]], *, what: str
) -> list[Point]:
    """The first `count` different points: rounded numbers and choices may meet again."""
    if not fields:
        raise UsageError(f"sweep: {what} needs at least one field")
    found: dict[str, Point] = {}
    for row in itertools.islice(parts, 1000 + 100 * count):
        if len(found) >= count:
            break
        named = builtins.zip(fields.items(), row, strict=True)
        point = {path: distribution(part) for (path, distribution), part in named}
        found.setdefault(key(point), point)
    if len(found) < count:
        raise UsageError(f"sweep: {what} finds only {len(found)} different points of the {count}; ask for fewer")
    return list(found.values())


def _joined(parts: Iterable[Point]) -> Point:
    point: Point = {}
    for part in parts:
        for path, value in part.items():
            if path in point:
                raise UsageError(f"sweep: {path} is given twice in one point ({point[path]!r} and {value!r})")
            point[path] = value
    return point


def _rounded(value: float, low: float, high: float) -> float:
    return float(min(max(float(f"{value:.{_DIGITS}g}"), low), high))


def _check_range(name: str, low: float, high: float) -> None:
    if not all(isinstance(end, int | float) for end in (low, high)):
        raise UsageError(f"sweep: {name}({low!r}, {high!r}) needs two numbers")
    if not low < high:
        raise UsageError(f"sweep: {name}({low:g}, {high:g}) needs a lower end below its upper end")
