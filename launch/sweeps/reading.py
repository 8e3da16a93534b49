"""The points of a sweep, from the function `sweep(add)` of a config file and from `--sweep...` flags.

    def sweep(add):                                              beside get_config, in the config file
        for learning_rate in (1e-3, 3e-3):
            add(**{"config.optim.learning_rate": learning_rate})

    --sweep.config.optim.learning_rate=1e-3,3e-3                 the same, on the command line
    --sweep.config.optim.learning_rate='log_uniform(1e-4, 1e-2)' --sweep.points=16 --sweep.draw=sobol
    --sweep.combine=zip     lists of several fields: product (the default), zip or chain
    --sweep.seeds=3         each point with config.seed 0, 1 and 2

What the file adds, the lists, the drawn points and the seeds are multiplied with each other.
"""

import ast
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from launch.sweeps import points as combining
from launch.sweeps.points import Distribution, Point
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import call_function

_PREFIX = "--sweep."
_COMBINE: dict[str, Callable[..., list[Point]]] = {
    "product": combining.product,
    "zip": combining.zipped,
    "chain": combining.chain,
}
_DRAW: dict[str, Callable[..., list[Point]]] = {"random": combining.drawn, "sobol": combining.sobol}
_DISTRIBUTIONS: dict[str, Callable[..., Distribution]] = {
    "uniform": combining.uniform,
    "log_uniform": combining.log_uniform,
    "integers": combining.integers,
    "choice": combining.choice,
}


@dataclasses.dataclass
class _Flags:
    lists: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    distributions: dict[str, Distribution] = dataclasses.field(default_factory=dict)
    combine: str = "product"
    draw: str = "random"
    points: int = 0
    seed: int = 0
    seeds: int = 0
    given: dict[str, str] = dataclasses.field(default_factory=dict)  # {path: argument}


def read(config_arguments: Sequence[str], sweep_arguments: Sequence[str]) -> list[Point]:
    """All points. Raises UsageError in one line for a flag that is none, or a sweep that nothing describes."""
    flags = _parsed(sweep_arguments)
    parts: list[list[Point]] = []
    added: list[Point] = []
    found, _ = call_function(config_arguments, "sweep", _adder(added))
    if found:
        parts.append(added)
    if flags.lists:
        lists = [combining.values(path, chosen) for path, chosen in flags.lists.items()]
        parts.append(_COMBINE[flags.combine](*lists))
    if flags.distributions:
        if flags.points < 1:
            first = next(iter(flags.distributions))
            raise UsageError(f"{_PREFIX}{first} draws its values; say how many points, by {_PREFIX}points=16")
        parts.append(_DRAW[flags.draw](flags.points, flags.distributions, seed=flags.seed))
    if flags.seeds:
        parts.append(combining.seeds(flags.seeds))
    if not parts:
        file = next(each for each in config_arguments if each.startswith("--config="))
        raise UsageError(
            f"nothing to sweep: {file} has no function sweep(add), and no {_PREFIX}config.FIELD=A,B is given"
        )
    return combining.product(*parts)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the `--sweep.` arguments, the others)."""
    chosen = [each for each in arguments if each.startswith(_PREFIX)]
    return chosen, [each for each in arguments if not each.startswith(_PREFIX)]


def _adder(added: list[Point]) -> Callable[..., None]:
    def add(*given: Point, **fields: Any) -> None:
        """A point as keywords, or any number of points as dicts: add(*product(...))."""
        added.extend(given)
        if fields or not given:
            added.append(fields)

    return add


def _parsed(arguments: Sequence[str]) -> _Flags:
    flags = _Flags()
    for argument in arguments:
        path, equals, text = argument.removeprefix(_PREFIX).partition("=")
        if not equals or not text.strip():
            raise UsageError(f"{argument} needs a value: {_PREFIX}{path}=A,B")
        if path in flags.given:
            raise UsageError(f"{argument}: {path} is given twice; separate the values of a field by commas")
        flags.given[path] = argument
        if path.startswith("config."):
            _field(flags, path, text, argument)
        elif path in ("points", "seed", "seeds"):
            if not re.fullmatch("[0-9]{1,9}", text) or (path != "seed" and int(text) < 1):
                raise UsageError(f"{argument} should be a whole number of at least {int(path != 'seed')}")
            setattr(flags, path, int(text))
        elif path in ("combine", "draw"):
            known = _COMBINE if path == "combine" else _DRAW
            if text not in known:
                raise UsageError(f"{argument}: {text!r} is unknown; {nearest(text, known)}")
            setattr(flags, path, text)
        else:
            options = [f"{_PREFIX}{name}" for name in ("points", "seed", "seeds", "combine", "draw")]
            raise UsageError(f"{argument}: {nearest(_PREFIX + path, [*options, f'{_PREFIX}config.{path}'])}")
    _check_effect(flags)
    return flags


def _check_effect(flags: _Flags) -> None:
    """A flag that changes nothing is a mistake: of its writer, or of its reader."""
    for name in ("points", "draw", "seed"):
        if name in flags.given and not flags.distributions:
            raise UsageError(
                f"{flags.given[name]} has no effect: no field is drawn; say what is, by "
                f"'{_PREFIX}config.FIELD=log_uniform(1e-4, 1e-2)', or leave it out"
            )
    if "combine" in flags.given and len(flags.lists) < 2:
        raise UsageError(f"{flags.given['combine']} has no effect: it joins lists of several fields; leave it out")


def _field(flags: _Flags, path: str, text: str, argument: str) -> None:
    call = re.fullmatch(r"\s*([a-z_]+)\s*\((.*)\)\s*", text)
    if call and call.group(1) in _DISTRIBUTIONS:
        try:
            flags.distributions[path] = _DISTRIBUTIONS[call.group(1)](*_items(call.group(2)))
        except TypeError as error:
            raise UsageError(f"{argument}: {' '.join(str(error).split())}") from None
    elif call:
        raise UsageError(f"{argument}: {call.group(1)!r} is unknown; {nearest(call.group(1), _DISTRIBUTIONS)}")
    else:
        flags.lists[path] = _items(text)


def _items(text: str) -> list[Any]:
    """The values between commas; those inside of brackets and of quotes are left alone."""
    found, depth, start, quote, before = [], 0, 0, "", ","
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and before in ",([" and letter in text[place + 1 :]:  # elsewhere it is an apostrophe
            quote = letter
        else:
            depth += (letter in "([") - (letter in ")]")
            if letter == "," and depth == 0:
                found.append(text[start:place])
                start = place + 1
        before = before if letter.isspace() else letter
    return [_literal(each.strip()) for each in [*found, text[start:]] if each.strip()]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
