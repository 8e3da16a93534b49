"""From a record to a document: which field is its text, and named changes of that text.

Not templates and chat formats: those turn several fields into a text and stand in a file of their own.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.config import FieldsConfig


class Document(NamedTuple):
    """Text to train on; `inputs` comes before it and is only read (empty for plain documents)."""

    inputs: str
    text: str


PREPROCESSORS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "unix_newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
}


def check(names: Sequence[str], fields: FieldsConfig) -> None:
    """UsageError for an unknown preprocessor or half an example."""
    for name in names:
        if name not in PREPROCESSORS:
            raise UsageError(f"config.data.preprocessors: {name!r} is unknown; {nearest(name, PREPROCESSORS)}")
    if bool(fields.inputs) != bool(fields.targets):
        raise UsageError("config.data.fields: give both inputs and targets, or neither (then text is used)")


def document(record: dict[str, Any], fields: FieldsConfig, names: Sequence[str]) -> Document:
    """The document of a record; a UserError does not say where the record lies."""
    inputs, text = "", _field(record, fields.targets or fields.text, "targets" if fields.targets else "text")
    if fields.inputs:
        inputs = _field(record, fields.inputs, "inputs")
    for name in names:
        inputs, text = PREPROCESSORS[name](inputs), PREPROCESSORS[name](text)
    return Document(inputs, text)


def _field(record: dict[str, Any], name: str, kind: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        return value
    if name not in record:
        raise UserError(f"no field {name!r} among {', '.join(record)}; set config.data.fields.{kind}")
    raise UserError(f"field {name!r} should be a text, is {value!r:.60}")
