"""The functions and filters that templates have instead of Jinja's own: each makes as much as it was told it may."""

import datetime
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2.exceptions
import jinja2.filters
import jinja2.utils

from t5x_like.data.templates.limits import DIGITS, SPACES, ConversationRefused, Meter, TemplateRefused


def round_to(value: Any, precision: int = 0, method: str = "common") -> float:
    if not isinstance(precision, int) or abs(precision) > DIGITS or large(value):
        raise TemplateRefused(f"the filter round is for numbers of at most {DIGITS} digits")
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


def total(values: Any, attribute: str | None = None, start: float = 0) -> float:
    listed = [value if attribute is None else value[attribute] for value in values]
    if not all(isinstance(value, int | float) for value in (start, *listed)):
        raise TemplateRefused("the filter sum is for numbers")
    return sum(listed, start)


def large(value: Any, limit: int = 1 << 64) -> bool:
    return isinstance(value, int) and abs(value) > limit


class Dictionary:
    """`dict(...)` and `dict.fromkeys(...)` without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """A namespace whose names do not begin with an underscore; what it holds is not written out."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __repr__(self) -> str:
        return "<Namespace>"

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the namespace has no attribute {name!r}")


def raise_exception(message: str) -> None:
    raise ConversationRefused(" ".join(str(message).split())[:200])


def moment(now: datetime.datetime | None) -> Callable[[str], str]:
    return lambda form: (now or datetime.datetime.now()).strftime(form)


def tojson(meter: Meter) -> Callable[..., str]:
    def written(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        spaces = min(indent, SPACES) if isinstance(indent, int) else indent
        entries, depth = _nesting(meter.whole(value))
        before = 0 if spaces is None else depth * (spaces if isinstance(spaces, int) else len(spaces))
        meter.check(entries * (before + sum(map(len, separators or ()))))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=spaces, separators=separators, sort_keys=sort_keys)

    return written


def _nesting(value: Any) -> tuple[int, int]:
    """(entries of lists in lists, how deep they are)."""
    level, entries, depth = [value], 0, 0
    while level:
        lists = [each for each in level if isinstance(each, Mapping | list | tuple)]
        level = [item for each in lists for item in (each.values() if isinstance(each, Mapping) else each)]
        entries, depth = entries + len(level), depth + 1
    return entries, depth
