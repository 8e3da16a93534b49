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
    "replace_surrogates": lambda text: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"),
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
    kind = "targets" if fields.targets else "text"
    inputs, text = "", _field(record, fields.targets or fields.text, kind)
    if fields.inputs:
        inputs = _field(record, fields.inputs, "inputs")
    for name in names:
        inputs, text = PREPROCESSORS[name](inputs), PREPROCESSORS[name](text)
    _check_unicode(inputs, fields.inputs)
    _check_unicode(text, fields.targets or fields.text)
    return Document(inputs, text)


def _check_unicode(text: str, name: str) -> None:
    """JSON may spell out half of a surrogate pair, which no UTF-8 has."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"field {name!r} holds a lone surrogate ({text[error.start]!a}), which is no text; "
            "add 'replace_surrogates' to config.data.preprocessors, or mend the file"
        ) from None


def _field(record: dict[str, Any], name: str, kind: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        return value
    if name not in record:
        raise UserError(f"no field {name!r} among {', '.join(record)}; set config.data.fields.{kind}")
    raise UserError(f"field {name!r} should be a text, is {value!r:.60}")
