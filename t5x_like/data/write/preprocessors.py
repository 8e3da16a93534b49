"""From a record to a document: which field is its text, and named changes of that text.

Chat templates, which turn a conversation into a text, are in data/templates; `conversation` reads it from a record.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.config import FieldsConfig
from t5x_like.data.templates import messages
from t5x_like.data.write import preferences


class Document(NamedTuple):
    """Text to train on; `inputs` comes before it and is only read (empty for plain documents).

    rejected: of a pair, the answer to `inputs` that is worse than `text`; label: the class of `text`; written: a
    conversation through a chat template (data/write/chats.py), which has no other text
    """

    inputs: str
    text: str
    rejected: str = ""
    label: int = 0
    written: Any = None


_MISSING = object()
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
    pair = [bool(name) for name in (fields.chosen, fields.rejected)]
    if (any(pair) or fields.prompt) and not all(pair):
        raise UsageError("config.data.fields: give chosen and rejected, and prompt unless they are whole dialogues")
    if any(pair) + bool(fields.label) + bool(fields.inputs or fields.messages) > 1:
        raise UsageError(
            "config.data.fields: give inputs and targets, or prompt, chosen and rejected, or label, or messages (with "
            "inputs and targets too where sources of both are mixed)"
        )


def document(record: dict[str, Any], fields: FieldsConfig, names: Sequence[str]) -> Document:
    """The document of a record; a UserError does not say where the record lies."""
    kinds = ("text",)
    if fields.rejected:
        kinds = ("prompt", "chosen", "rejected") if fields.prompt else ("chosen", "rejected")
    elif fields.targets:
        kinds = ("targets", "inputs")
    texts = {}
    for kind in kinds:
        text = _field(record, getattr(fields, kind), kind)
        for name in names:
            text = PREPROCESSORS[name](text)
        texts[kind] = text
    for kind in reversed(kinds):
        _check_unicode(texts[kind], getattr(fields, kind))
    if fields.rejected:
        answers = texts["chosen"], texts["rejected"]
        prompt, chosen, rejected = (texts["prompt"], *answers) if fields.prompt else preferences.divided(*answers)
        return Document(prompt, chosen, rejected=rejected)
    if fields.targets:
        return Document(texts["inputs"], texts["targets"])
    return Document("", texts["text"], label=_label(record, fields.label) if fields.label else 0)


def is_conversation(record: dict[str, Any], fields: FieldsConfig) -> bool:
    """Whether a record is a conversation, which where examples are read too is one that has messages."""
    if not (fields.messages and fields.targets):
        return bool(fields.messages)
    value = _value(record, fields.messages)
    return value is not _MISSING and value is not None and not (isinstance(value, str | bytes | list) and not value)


def conversation(record: dict[str, Any], fields: FieldsConfig, names: Sequence[str]) -> list[messages.Message]:
    """The messages of a record, or the two of an example; UserError as in `document`."""

    def change(text: str) -> str:
        for name in names:
            text = PREPROCESSORS[name](text)
        _check_unicode(text, fields.messages)
        return text

    value = _value(record, fields.messages) if fields.messages else _MISSING
    if not is_conversation(record, fields):
        if value is _MISSING and fields.messages and _value(record, fields.targets) is _MISSING:
            raise UserError(
                f"no field {fields.messages!r} and no field {fields.targets!r} among {', '.join(record)}; set "
                "config.data.fields.messages, inputs and targets"
            )
        found = document(record, fields, names)
        return messages.of_example(found.inputs, found.text)
    if value is _MISSING:
        raise UserError(f"no field {fields.messages!r} among {', '.join(record)}; set config.data.fields.messages")
    return _with_system(record, messages.of_value(value, fields.messages, change, tools=record.get("tools")), change)


def _with_system(
    record: dict[str, Any], found: list[messages.Message], change: Callable[[str], str]
) -> list[messages.Message]:
    """With what a field beside a conversation says: ShareGPT's `system`."""
    system = record.get("system")
    if isinstance(system, str) and system and found[0]["role"] != "system":
        return [*messages.of_list([{"role": "system", "content": system}], "field 'system'", change), *found]
    return found


def conversations(
    record: dict[str, Any], fields: FieldsConfig, names: Sequence[str]
) -> tuple[list[messages.Message], list[messages.Message]]:
    """Both conversations of a pair; UserError as in `document`."""

    def change(text: str) -> str:
        for name in names:
            text = PREPROCESSORS[name](text)
        _check_unicode(text, fields.chosen)
        return text

    values = {}
    for kind in ("prompt", "chosen", "rejected"):
        name = getattr(fields, kind)
        values[kind] = _value(record, name) if name else None
        if values[kind] is _MISSING:
            raise UserError(f"no field {name!r} among {', '.join(record)}; set config.data.fields.{kind}")
    messages.check_tools(record.get("tools"))
    return preferences.conversations(
        values["prompt"],
        values["chosen"],
        values["rejected"],
        names=(fields.prompt, fields.chosen, fields.rejected),
        change=change,
    )


def _label(record: dict[str, Any], name: str) -> int:
    value = _value(record, name)
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is int and 0 <= number < 1 << 31:
        return number
    if value is _MISSING:
        raise UserError(f"no field {name!r} among {', '.join(record)}; set config.data.fields.label")
    raise UserError(f"field {name!r} should be a class, a whole number from 0, is {value!r:.60}")


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
    value = _value(record, name)
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"field {name!r} is not UTF-8 at byte {error.start}") from None
    if value is _MISSING:
        raise UserError(f"no field {name!r} among {', '.join(record)}; set config.data.fields.{kind}")
    found = "null" if value is None else " ".join(f"{value!r:.60}".split())
    raise UserError(f"field {name!r} should be a text, is {found}")


def _value(record: dict[str, Any], name: str) -> Any:
    """The value of a field, or of one within others (`doc.text`)."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if value is None:  # as a table gives it for a column within one that is null
            return None
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value
