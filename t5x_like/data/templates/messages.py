"""Conversations of records: from the forms in which people have them to a list of {role, content}.

A message is {role, content} (its other keys go to the template as they are), or {from, value} as ShareGPT has it. A
list may also be written as JSON, as in a CSV cell or a SeqIO feature. Raises UserError, without the place of a record.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UserError
from t5x_like.data.templates.sandbox import CLOSE, OPEN

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
# What other data sets call them.
NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system", "observation": "tool"}
BREAK = "\ufdd2"  # within a text that spells out a special token
_RESERVED = (OPEN, CLOSE, BREAK)


def of_value(value: Any, name: str, change: Callable[[str], str], *, tools: Any = None) -> list[Message]:
    """The messages of a field `name`; `change` is what preprocessors do to each text. One is the assistant's.

    tools: the field `tools` of the same record
    """
    if isinstance(value, str | bytes):
        value = _of_json(value, name)
    found = of_list(value, f"field {name!r}", change)
    if all(message["role"] != "assistant" for message in found):
        raise UserError(f"the conversation of field {name!r} has no turn of the assistant, so nothing of it is trained")
    check_tools(tools)
    return found


def check_tools(offered: Any) -> None:
    """UserError for a field `tools` that offers any: nothing hands them to a template. It may be a JSON text, and of
    numpy as a SeqIO feature is."""
    offered = offered.tolist() if hasattr(offered, "tolist") else offered
    offered = offered.decode("utf-8", "replace") if isinstance(offered, bytes) else offered
    if offered and not (isinstance(offered, str) and offered.strip() in ("", "[]", "{}", "null")):
        raise UserError("field 'tools' offers tools, which is not supported; leave such records out, or the field")


def of_list(value: Any, where: str, change: Callable[[str], str] = str) -> list[Message]:
    """The messages of a list, whoever speaks last."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} should be a list of messages, is {_shown(value)}")
    try:
        return [_message(each, f"message {number} of {where}", change) for number, each in enumerate(value, 1)]
    except RecursionError:
        raise UserError(f"{where} holds lists in lists that are too deep") from None


def listed(value: Any) -> Any:
    """The list of messages that a text spells as JSON, as in a CSV cell; any other value as it is."""
    if not isinstance(value, str | bytes) or value.strip()[:1] not in ("[", b"["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    speaks = (
        isinstance(found, list) and found and all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in found)
    )
    return found if speaks else value


def of_example(inputs: str, targets: str) -> list[Message]:
    """An example as a conversation of one question."""
    return [{"role": "user", "content": inputs}, {"role": "assistant", "content": targets}]


def _of_json(value: str | bytes, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"field {name!r} should be a list of messages, is the text {_shown(value)}") from None


def _message(value: Any, where: str, change: Callable[[str], str]) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} should be {{role, content}}, is {_shown(value)}")
    given = {str(key): _plain(item) for key, item in value.items() if item is not None}
    if "from" in given and "role" not in given:
        given = {"role": given.pop("from"), "content": given.pop("value", None), **given}
    role = given.get("role")
    role = NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        told = nearest(role, [*ROLES, *NAMES]) if isinstance(role, str) else f"known: {', '.join(ROLES)}"
        raise UserError(f"{where} has the role {_shown(role)}, which is unknown; {told}")
    content = given.get("content")
    for name, item in given.items():
        if name != "content":
            _check_texts(name, f"{where}, key {name!r},")
            _check_texts(item, f"{where}, key {name!r},")
    if content is None and "tool_calls" in given:
        return given | {"role": role}
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(content, str):
        raise UserError(f"{where} should have a text as its content, has {_shown(content)}")
    text = change(content)
    _check_texts(text, where)
    return given | {"role": role, "content": text}


def _check_texts(value: Any, where: str) -> None:
    """UserError for a text in a value that no file of UTF-8 has, or that holds marks of templates."""
    if isinstance(value, str):
        odd = next((mark for mark in _RESERVED if mark in value), None) or _surrogate(value)
        if odd is not None:
            raise UserError(f"{where} holds U+{ord(odd):04X}, which is no character; mend the file")
    elif isinstance(value, Mapping):
        _check_texts([*value.keys(), *value.values()], where)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, where)


def _surrogate(text: str) -> str | None:
    return None if text.isascii() else next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)


def _joined(parts: list[Any], where: str) -> str:
    """Of [{"type": "text", "text": ...}, ...]."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise UserError(f"{where} holds other parts than texts, which is not supported")
    return "".join(found)


def _plain(value: Any) -> Any:
    """Plain JSON values: a template sees no object that could do more."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    return next((kind(value) for kind in (str, int, float) if isinstance(value, kind)), f"<{type(value).__name__}>")


def _shown(value: Any) -> str:
    return "null" if value is None else " ".join(f"{value!r:.60}".split())
