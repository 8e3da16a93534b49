"""From a record to a document: which field is its text, and named changes of that text.

Not templates and chat formats: those turn several fields into a text and stand in a file of their own.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UserError
from t5x_like.data.config import FieldsConfig


@dataclasses.dataclass(frozen=True)
class Document:
    """Text to train on; `inputs` comes before it and is only read (empty for plain documents)."""

    inputs: str
    text: str


PREPROCESSORS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "unix_newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
}


def check(names: Sequence[str], fields: FieldsConfig) -> None:
    """UserError for an unknown preprocessor or half an example."""
    for name in names:
        if name not in PREPROCESSORS:
            raise UserError(f"config.data.preprocessors: {name!r} is unknown; {nearest(name, PREPROCESSORS)}")
    if bool(fields.inputs) != bool(fields.targets):
        raise UserError("config.data.fields: give both inputs and targets, or neither (then text is used)")


def document(record: dict[str, Any], fields: FieldsConfig, names: Sequence[str], *, place: str) -> Document:
    """The document of a record at `place` (a file and offset, for messages)."""
    if fields.targets:
        inputs, text = (
            _field(record, name, kind, place)
            for name, kind in zip((fields.inputs, fields.targets), ("inputs", "targets"), strict=True)
        )
    else:
        inputs, text = "", _field(record, fields.text, "text", place)
    for name in names:
        inputs, text = PREPROCESSORS[name](inputs), PREPROCESSORS[name](text)
    return Document(inputs, text)


def _field(record: dict[str, Any], name: str, kind: str, place: str) -> str:
    if name not in record:
        raise UserError(f"{place}: no field {name!r} among {', '.join(record)}; set config.data.fields.{kind}")
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} should be a text, is {value!r:.60}")
    return value
