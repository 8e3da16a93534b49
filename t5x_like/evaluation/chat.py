"""The chat template of a tokenizer folder: messages to one text, in a sandbox, and the ids of that text."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.data.templates.sandbox import Template
from t5x_like.data.tokenizers.vocabularies import Vocabulary

_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Chat:
    """template: Jinja as transformers has it, "" without one. special: the ids of texts that are one token each.
    names: what bos_token and eos_token stand for in a template."""

    template: str
    special: Mapping[str, int]
    names: Mapping[str, str]

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Without a generation prompt the last message is left open, to be continued."""
        if not self.template:
            raise UserError(f"the tokenizer has no chat template; add {_TEMPLATE} to its folder, or leave --chat out")
        values = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            text = _compiled(self.template).render({**self.names, "tools": None, "documents": None, **values})
        except UserError as error:
            raise UserError(f"the chat template does not render these messages: {error}") from None
        if add_generation_prompt:
            return text
        last = str(messages[-1]["content"]).strip()
        place = text.rindex(last) if last in text else len(text)
        return text[: place + len(last)]

    def encode(self, vocabulary: Vocabulary, text: str) -> list[int]:
        """Ids of a rendered text, in which what spells a special token is that token."""
        ids: list[int] = []
        for part in re.split(self._pattern, text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += vocabulary.encode(part)
        return ids

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest))})")


def read(folder: str, vocabulary: Vocabulary) -> Chat:
    """Of the files of Hugging Face in a local folder; a folder without them has no template."""
    template = _object(os.path.join(folder, _SETTINGS)).get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default", "")
    place = os.path.join(folder, _TEMPLATE)
    if os.path.exists(place):
        with open(place, encoding="utf-8") as file:
            template = file.read()
    special = dict(vocabulary.specials)
    by_id = {token: text for text, token in special.items()}
    ends = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
    names = {name: "" if token is None else by_id.get(token, "") for name, token in ends.items()}
    return Chat(template, special, names)


def _object(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); copy the file again") from None


@functools.cache
def _compiled(template: str) -> Template:
    return Template(template)
