"""Pairs as data sets of preferences have them: a prompt and two answers, two whole dialogues, two conversations.

Whole dialogues are texts such as those of hh-rlhf ("\\n\\nHuman: ...\\n\\nAssistant: ..."); their prompt is what both
say up to the last turn of the assistant. Raises UserError, without the place of a record.
"""

import os
from collections.abc import Callable
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.templates import messages
from t5x_like.data.templates.messages import Message

TURN = "\n\nAssistant:"


def divided(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of two whole dialogues.

    >>> divided("\\n\\nHuman: a?\\n\\nAssistant: b", "\\n\\nHuman: a?\\n\\nAssistant: c")
    ('\\n\\nHuman: a?\\n\\nAssistant:', ' b', ' c')
    """
    last = os.path.commonprefix([chosen, rejected]).rfind(TURN)
    if last < 0 or {chosen.rfind(TURN), rejected.rfind(TURN)} != {last}:
        raise UserError(
            "the prompts of a pair differ: two whole dialogues should be the same through the last "
            f"{TURN!r}; or name the field of the prompt, config.data.fields.prompt"
        )
    end = last + len(TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def conversations(
    prompt: Any, chosen: Any, rejected: Any, *, names: tuple[str, str, str], change: Callable[[str], str]
) -> tuple[list[Message], list[Message]]:
    """Both conversations, each with the answer as its last message. prompt: a text, messages, or None where both begin
    with it; answers: texts or messages, the whole conversation or what follows the prompt; lists may be JSON texts;
    names: of these fields."""
    before = [] if prompt is None else _messages(prompt, names[0], "user", change)
    both = [
        _behind(before, _messages(value, name, "assistant", change))
        for value, name in ((chosen, names[1]), (rejected, names[2]))
    ]
    for found, name in zip(both, names[1:], strict=True):
        if found[-1]["role"] != "assistant":
            raise UserError(f"field {name!r} should end with a turn of the assistant, ends with {found[-1]['role']!r}")
    if both[0][:-1] != both[1][:-1]:
        raise UserError(
            "the prompts of a pair differ: two conversations should be the same up to the last turn of the assistant"
        )
    if len(both[0]) < 2:
        raise UserError(f"a pair has no prompt; {names[1]!r} should hold the whole conversation, or name the prompt's")
    return both[0], both[1]


def _behind(before: list[Message], answer: list[Message]) -> list[Message]:
    """The whole conversation; some data sets give the prompt once more in each answer, or the last of it."""
    whole = len(answer) > 1 and before and (answer[: len(before)] == before or answer[-2] == before[-1])
    return answer if whole else [*before, *answer]


def _messages(value: Any, name: str, role: str, change: Callable[[str], str]) -> list[Message]:
    value = messages.listed(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return messages.of_list(value, f"field {name!r}", change)
