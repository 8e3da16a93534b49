"""What a template may use, counted: rounds, seconds, characters. Whatever exceeds it is refused in one line."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from t5x_like.core.errors import UserError

SECONDS = 5.0
SIZE = 1 << 22  # characters of a text, or entries of a list
ENTRY = 4  # characters that an entry of a list in lists counts for
MADE = 1 << 26  # of all texts and lists that are made on the way
ROUNDS = 1 << 20  # of loops and macros
LONG = 1 << 16  # characters and entries of a conversation that may be too long for a template that is none too long
DIGITS = 64  # of rounding
SPACES = 64  # before a line of JSON
CONTAINERS = (list, tuple, set, Mapping)


class TemplateRefused(UserError):
    """The template itself cannot be used, whatever the conversation is."""


class Limit(TemplateRefused):
    """It wants more than there is."""


class ConversationRefused(UserError):
    """The template does not render this conversation: it says so (raise_exception), or fails with it."""


class Meter:
    """What one rendering has used."""

    def start(self) -> None:
        self._rounds, self._size, self._made, self._end = 0, 0, 0, time.monotonic() + SECONDS

    def tick(self) -> str:
        self._rounds += 1
        self.look(self._rounds <= ROUNDS)
        return ""

    def look(self, enough: bool = True) -> None:
        """At the clock."""
        if not enough or time.monotonic() > self._end:
            raise Limit(f"it takes more than {ROUNDS} rounds of its loops, or more than {SECONDS:g} s")

    def add(self, size: int) -> None:
        self._size += size
        self.check(self._size)

    def check(self, size: int) -> None:
        if size > SIZE or self._made > MADE:
            raise Limit(f"it makes a text or a list of more than {SIZE} characters or entries")

    def sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict):
            self._made += len(value)
            self.check(len(value))
        return value if isinstance(value, str) else self.whole(value)

    def whole(self, value: Any) -> Any:
        """The value, if writing it out is short enough: lists in lists may hold the same one many times."""
        if isinstance(value, (str, *CONTAINERS)):
            self.look()
            self.check(written_out(value, self.check))
        return value


def written_out(value: Any, check: Callable[[int], None] = lambda size: None) -> int:
    """Characters of a value, entries counting for ENTRY; `check` is called with how many there are at least."""
    if not isinstance(value, CONTAINERS):
        return len(value) if isinstance(value, str) else ENTRY
    waiting, size = [value], ENTRY
    while waiting:
        each = waiting.pop()
        items = [*each.keys(), *each.values()] if isinstance(each, Mapping) else each
        size += ENTRY * len(items) + sum(len(item) for item in items if isinstance(item, str))
        check(size)
        waiting += [item for item in items if isinstance(item, CONTAINERS)]
    return size
