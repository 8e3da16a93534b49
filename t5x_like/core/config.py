"""The strict bridge between a ConfigDict (mutable, at the edge) and frozen dataclasses (inside). No config lives here.

Every field of the dataclass must be given and nothing else: an unknown key is refused with the nearest name, a
missing key, a wrong type and a number that is not finite are named with their path. A section class may have a method
`check(path)`, which raises UsageError for values that cannot work; it is called as soon as the section is built.

A section with variants has a field `name`, which picks one of the fields marked VARIANT. The others are checked if they
are given, and are None in what is built: nothing reads them, and no stored config holds them.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

from ml_collections import ConfigDict

from t5x_like.core.errors import UsageError

# Metadata of fields: `dataclasses.field(metadata=VARIANT)`.
VARIANT: Mapping[str, bool] = types.MappingProxyType({"variant": True})
RESUME_MAY_CHANGE: Mapping[str, bool] = types.MappingProxyType({"resume": True})  # the run stays the same

Section = TypeVar("Section")
Values: TypeAlias = Mapping[str, Any] | ConfigDict  # a section at the edge; ConfigDict is no Mapping


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for an error line: the closest known name, or the list of them.

    >>> nearest("lenght", ["length", "width"])
    "did you mean 'length'?"
    """
    names = sorted({*names})
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def build(cls: type[Section], section: Values, *, path: str) -> Section:
    """An instance of the frozen dataclass `cls` from `section`; `path` is its place, such as `config.data`."""
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in section:
        if key not in fields:
            raise UsageError(f"{path}.{key} is unknown; {nearest(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, field in fields.items():
        unnamed = "variant" in field.metadata and section.get("name") != key
        if key not in section and not unnamed:
            raise UsageError(f"{path}.{key} is missing; every field is given by the config (see configs/common)")
        given = _convert(hints[key], section[key], f"{path}.{key}") if key in section else None
        if "variant" in field.metadata and not unnamed and given is None:
            raise UsageError(f"{path}.{key} is missing, and {path}.name={key!r} needs it; give that section")
        values[key] = None if unnamed else given
    built = cls(**values)
    check = getattr(built, "check", None)
    if check is not None:
        check(path)
    return built


def named(section: Any) -> Any:
    """The subsection of the variant that a section names; the name must be one of a VARIANT field."""
    found = getattr(section, section.name)
    assert found is not None, "build() gives the named variant"
    return found


def field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(value) if _is_stored(field, value)
        }
        return {name: to_dict(item) for name, item in items.items()}
    if isinstance(value, Mapping | ConfigDict):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def section_class(cls: type, name: str) -> type | None:
    """The class of a section within a section class, None where the field holds a value."""
    hint = typing.get_type_hints(cls)[name]
    found = [each for each in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(each)]
    return typing.cast(type, found[0]) if found else None


def marked(cls: type, mark: str, *, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the fields of a section class, and of the classes of its sections, whose metadata have a mark."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if mark in field.metadata:
            yield f"{prefix}{field.name}"
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from marked(typing.cast(type, hints[field.name]), mark, prefix=f"{prefix}{field.name}.")


def open_sections(cls: type, *, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted path, type of a value) of the sections below a class whose keys a run names itself: its `dict` fields."""
    for name, hint in typing.get_type_hints(cls).items():
        yield from _open(hint, f"{prefix}{name}")


def _open(hint: Any, path: str) -> Iterator[tuple[str, type]]:
    if dataclasses.is_dataclass(hint):
        yield from open_sections(typing.cast(type, hint), prefix=f"{path}.")
    elif typing.get_origin(hint) is dict:
        value = typing.get_args(hint)[1]
        yield path, value if isinstance(value, type) else object  # one type, else any literal


def _is_stored(field: "dataclasses.Field[Any]", section: Any) -> bool:
    return "variant" not in field.metadata or getattr(section, field.name) is not None


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
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UsageError(f"{path}={value} should be a finite number")
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{path}={value!r} should be {_describe(hint)}, not {type(value).__name__}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    others = [argument for argument in arguments if argument is not type(None)]
    if float in others and isinstance(value, float):
        return _convert(float, value, path)
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
