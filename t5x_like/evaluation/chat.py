"""Requests that a chat template writes, for lm-evaluation-harness, which hands them around as texts: their tokens are
those of training and serving, data/templates/chat.py."""

import bisect
import functools
import os
from collections.abc import Sequence

from t5x_like.data.templates.chat import Chat, Rendered
from t5x_like.data.templates.messages import Message, of_list


class Requests:
    """What was rendered, remembered by its text: which parts of that are special tokens does not follow from it, since
    a message may spell one out. template: Jinja."""

    def __init__(self, chat: Chat):
        self.template, self._chat = chat.text, chat
        self._rendered: dict[str, Rendered] = {}
        self._texts: list[str] = []  # sorted; without white space at the end, which the harness moves to an answer

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return self._chat.stop_ids()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Without a generation prompt the last message is left open, to be continued."""
        given = of_list([*messages], "a request")
        rendered = self._chat.prompt(given) if add_generation_prompt else self._chat.begun(given)
        text = rendered.text.rstrip()
        if text not in self._rendered:
            bisect.insort(self._texts, text)
        self._rendered[text] = rendered
        return rendered.text

    def parts(self, text: str) -> list[str | int] | None:
        """Texts and ids of special tokens of a text that begins with one that was rendered; None for any other."""
        known = self._longest(text)
        if known is None:
            return None
        rendered = self._rendered[known]
        begin = rendered.text if text.startswith(rendered.text) else known
        parts, rest = rendered.parts(0, len(begin)), text[len(begin) :]
        if rest and parts and isinstance(parts[-1], str):
            return [*parts[:-1], f"{parts[-1]}{rest}"]
        return [*parts, rest] if rest else parts

    def _longest(self, text: str) -> str | None:
        """The longest of the texts that this one begins with."""
        probe = text
        while index := bisect.bisect_right(self._texts, probe):
            known = self._texts[index - 1]
            if text.startswith(known):
                return known
            probe = os.path.commonprefix([known, probe])
        return None
