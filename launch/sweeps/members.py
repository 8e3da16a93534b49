"""The members of a sweep: its points with names, and the overrides that a point stands for on a command line.

A name is made of its point alone, so that it stays the same when a sweep grows; it is at most NAME_LENGTH characters
of a-z, 0-9 and -, begins with a letter, and so can be part of a Kubernetes name. `lr-1e-3-seed-0` is
{"config.optim.learning_rate": 1e-3, "config.seed": 0}.
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.sweeps import points as combining
from t5x_like.core.errors import UsageError

NAME_LENGTH = 32
JOB_LENGTH = 40  # what xpk takes, and what leaves room for the suffixes of pods of the largest slices
_DIGEST = 6  # hexadecimal digits that tell names apart where words cannot
_SCALAR = (int, float, str, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    point: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """The arguments that stand for the point."""
        return [f"--{path}={_text(value)}" for path, value in self.point.items()]

    @property
    def described(self) -> str:
        """For an error line: `the member lr-1e-3 (config.optim.learning_rate=0.001)`."""
        return f"the member {self.name} ({', '.join(override[2:] for override in self.overrides)})"


def members(sweep: Sequence[Mapping[str, Any]], known: Iterable[Member] = ()) -> list[Member]:
    """Those of `known`, with their names, then the other points of the sweep in order.

    Raises UsageError for an empty sweep, for a point that is no dict of config fields, and for two equal points.
    """
    made = {combining.key(member.point): member for member in known}
    if not sweep:
        raise UsageError("the sweep is empty: it adds no point")
    fresh: dict[str, str] = {}
    for given in sweep:
        point = _checked(given)
        mark = combining.key(point)
        if mark in fresh:
            raise UsageError(f"the sweep has two members with equal points: {fresh[mark]}; leave one out")
        fresh[mark] = Member("", point).described.partition("(")[2][:-1]
        if mark not in made:
            made[mark] = Member(_name(point, {member.name for member in made.values()}), point)
    return list(made.values())


def job_name(prefix: str, name: str, folder: str) -> str:
    """The name of a member's job on a cluster, where members of other sweeps may have the same point.

    >>> job_name("rates", "lr-1e-3", "gs://bucket/rates")
    'rates-lr-1e-3'
    """
    if len(prefix) + len(name) < JOB_LENGTH:
        return f"{prefix}-{name}"
    digest = hashlib.sha256(folder.encode()).hexdigest()[:_DIGEST]
    kept = prefix[: max(0, JOB_LENGTH - len(name) - len(digest) - 3)].rstrip("-")
    return f"{f'{kept}-' if kept else 's'}{digest}-{name}"


def _checked(point: Any) -> dict[str, Any]:
    if not isinstance(point, Mapping) or not point:
        raise UsageError(f"sweep: a point is a dict such as {{'config.seed': 1}}, not {point!r}")
    plain = {path: value.item() if hasattr(value, "item") else value for path, value in point.items()}  # of numpy
    for path, value in plain.items():
        if not (isinstance(path, str) and path.startswith("config.")):
            raise UsageError(f"sweep: {path!r} is no field of a config; write 'config.{path}'")
        items = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(item, _SCALAR) for item in items):
            raise UsageError(
                f"sweep: {path}={value!r} should be a number, a text, True, False, None, or a tuple of them"
            )
        if any(isinstance(item, float) and not math.isfinite(item) for item in items):
            raise UsageError(f"sweep: {path}={value!r} should be finite")
    return plain


def _text(value: Any) -> str:
    """A value as an override says it."""
    return repr(tuple(value)) if isinstance(value, list | tuple) else str(value)


# Names.


def _name(point: Mapping[str, Any], taken: set[str]) -> str:
    keys = [path.split(".")[-1] for path in point]
    short = [_initials(key) for key in keys]
    if len({*short}) < len(short):
        short = keys
    words = "-".join(f"{_plain(key)}-{_word(value)}" for key, value in zip(short, point.values(), strict=True))
    words = re.sub(r"-+", "-", words).strip("-")
    if not words[:1].isalpha():
        words = f"m-{words}"
    if len(words) <= NAME_LENGTH and words not in taken:
        return words
    kept, key = words[: NAME_LENGTH - _DIGEST - 1].rstrip("-"), combining.key(point)
    digests = (hashlib.sha256(f"{key}{'+' * turn}".encode()).hexdigest()[:_DIGEST] for turn in itertools.count())
    return next(name for name in (f"{kept}-{digest}" for digest in digests) if name not in taken)


def _initials(key: str) -> str:
    """`learning_rate` -> `lr`; a single word stays."""
    words = [word for word in key.split("_") if word]
    return "".join(word[0] for word in words) if len(words) > 1 else key


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(_word(item) for item in value)
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return _number(value)
    return _plain(str(value))


def _number(value: float) -> str:
    """0.001 -> 1e-3, 0.5 -> 0p5, -2 -> m2: a name has no dots, and a minus is what joins its parts."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    text = repr(value)
    if isinstance(value, float) and not -2 < exponent < 5:
        digits, _, power = f"{value:.15e}".partition("e")
        text = f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    text = text.removesuffix(".0").replace("+", "")
    return ("m" if value < 0 else "") + text.lstrip("-").replace(".", "p")


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
