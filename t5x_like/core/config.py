"""The strict bridge between a ConfigDict (mutable, at the edge) and frozen dataclasses (inside). No config lives here.

Every field of the dataclass must be given and nothing else: an unknown key is refused with the nearest name, a
missing key and a wrong type are named with their path. A section with variants is a dataclass whose field `name`
picks one of its subsections; `only_named` drops the others.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from ml_collections import ConfigDict

from t5x_like.core.errors import UsageError

Section = TypeVar("Section")
Values: TypeAlias = Mapping[str, Any] | ConfigDict  # a section at the edge; ConfigDict is no Mapping


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an error line: the closest known name, or the list of them.

    >>> nearest("lenght", ["length", "width"])
    "did you mean 'length'?"
    """
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def build(cls: type[Section], section: Values, *, path: str) -> Section:
    """An instance of the frozen dataclass `cls` from `section`; `path` is its place, such as `config.data`."""
    known = field_names(cls)
    for key in section:
        if key not in known:
            raise UsageError(f"{path}.{key} is unknown; {nearest(key, known)}")
    for key in known:
        if key not in section:
            raise UsageError(f"{path}.{key} is missing; every field is given by the config (see configs/common.py)")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(hints[key], section[key], f"{path}.{key}") for key in known})


def field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping | ConfigDict):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping | ConfigDict):
            fields = ", ".join(field_names(typing.cast(type, hint)))
            raise UsageError(f"{path}={value!r} should be a section with fields {fields}")
        return build(typing.cast(type, hint), value, path=path)
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is dict:
        items = value.items() if hasattr(value, "items") else None
        if items is None:
            raise UsageError(f"{path}={value!r} should be a mapping")
        return {str(key): _convert(arguments[1], item, f"{path}.{key}") for key, item in items}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{path}={value!r} should be {_describe(hint)}, not {type(value).__name__}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    others = [argument for argument in arguments if argument is not type(None)]
    for argument in others:
        try:
            return _convert(argument, value, path)
        except UsageError:
            if len(others) == 1:
                raise
    raise UsageError(f"{path}={value!r} should be {' or '.join(_describe(argument) for argument in arguments)}")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"{path}={value!r} should be a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if len(value) != len(arguments):
        raise UsageError(f"{path}={value!r} should have {len(arguments)} entries")
    return tuple(
        _convert(hint, item, f"{path}[{index}]")
        for index, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _describe(hint: Any) -> str:
    if hint is type(None):
        return "None"
    return {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}.get(hint, str(hint))
