"""A chat template at work: the text of a conversation, the special tokens in it, and what the assistant wrote.

Training, serving and evaluation render with this one class. Special tokens are those that the template writes; a
message that spells one out is text. What the assistant wrote is what the template marks with {% generation %}. In a
template without these marks it is found by rendering the conversation up to each turn and through it, which is checked
against the rendering of the whole. Tokens: data/tokenizers/vocabularies.py, `encode_parts`.
"""

import dataclasses
import datetime
import re
from collections.abc import Iterator, Sequence
from typing import Any

from t5x_like.core.errors import UsageError
from t5x_like.data.templates import named
from t5x_like.data.templates.messages import BREAK, Message
from t5x_like.data.templates.sandbox import CLOSE, OPEN, ConversationRefused, Template, TemplateRefused
from t5x_like.data.tokenizers.vocabularies import Vocabulary

NAMES = ("tokenizer", *named.TEMPLATES)
PREPARED = datetime.datetime(2025, 1, 1)  # what strftime_now tells in training: a cache does not depend on its day
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A text. tokens: (begin, end, id) of the special tokens in it; trained: (begin, end) of what the assistant wrote.
    Places are characters."""

    text: str
    tokens: tuple[tuple[int, int, int], ...]
    trained: tuple[tuple[int, int], ...]

    def parts(self, begin: int = 0, end: int | None = None) -> list[str | int]:
        """Texts and the ids of special tokens, one after the other."""
        stop = len(self.text) if end is None else end
        found: list[str | int] = []
        for first, last, token in self.tokens:
            if begin <= first and last <= stop:
                found += [*filter(None, [self.text[begin:first]]), token]
                begin = last
        return [*found, *filter(None, [self.text[begin:stop]])]

    def until(self, end: int) -> "Rendered":
        """The same up to a place in the text."""
        tokens = tuple(token for token in self.tokens if token[1] <= end)
        trained = tuple((first, min(last, end)) for first, last in self.trained if first < end)
        return Rendered(self.text[:end], tokens, trained)


def source(name: str, vocabulary: Vocabulary, *, system: str, where: str) -> str:
    """The Jinja text of a template in NAMES for a tokenizer. `system`: what a conversation without a message of the
    system begins with. UsageError for a tokenizer that lacks what the template needs."""
    if name == "tokenizer":
        text = vocabulary.chat_template
        if not text:
            raise UsageError(
                f"{where}='tokenizer', and the tokenizer has no chat template; give a folder with chat_template.jinja, "
                f"or one of {', '.join(named.TEMPLATES)}"
            )
    else:
        text = named.TEMPLATES[name]
        missing = [token for token in named.TOKENS[name] if token not in vocabulary.specials]
        if missing or vocabulary.eos_id is None:
            lacks = ", ".join(missing) or "an end token"
            raise UsageError(f"{where}={name!r}, and the tokenizer lacks {lacks}; use 'plain', or another tokenizer")
    if not system:
        return text
    begin = f"[{{'role': 'system', 'content': {_literal(system)}}}] + messages"
    before = f"{{%- if messages[0].role != 'system' %}}{{%- set messages = {begin} %}}{{%- endif %}}"
    return text if text.startswith(before) else before + text  # a run's own tokenizer has it already


def named_text(name: str, vocabulary: Vocabulary, *, system: str) -> str:
    """As `source`, of a run that was trained by a template in named.TEMPLATES; "" for any other name."""
    return source(name, vocabulary, system=system, where="config.data.chat.template") if name in named.TEMPLATES else ""


def _literal(text: str) -> str:
    """A text as Jinja writes it."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


class Chat:
    """A template with the tokenizer that it is for. `where` names it in errors. text: Jinja."""

    def __init__(self, text: str, vocabulary: Vocabulary, *, where: str, now: datetime.datetime | None = None):
        self.text, self._where, self._specials = text, where, dict(vocabulary.specials)
        names = {token: name for name, token in self._specials.items()}
        self._values = {
            "bos_token": names.get(vocabulary.bos_id, "") if vocabulary.bos_id is not None else "",
            "eos_token": names.get(vocabulary.eos_id, "") if vocabulary.eos_id is not None else "",
            "tools": None,
            "documents": None,
        }
        longest = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, (*longest, OPEN, CLOSE, BREAK))))
        self._spelled = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._marks = bool(_GENERATION.search(text))
        self._eos = vocabulary.eos_id
        try:
            self._template = Template(text, now=now)
        except TemplateRefused as error:
            raise TemplateRefused(f"{where} is refused: {error}") from None

    def prompt(self, messages: Sequence[Message]) -> Rendered:
        """The conversation so far, and what an answer begins with."""
        return self._render(messages, prompt=True)

    def begun(self, messages: Sequence[Message]) -> Rendered:
        """The conversation with its last message left open, to be continued."""
        whole = self._render(messages, prompt=False)
        content = messages[-1].get("content", "").strip()
        if content not in whole.text:
            raise ConversationRefused(f"{self._where} changes what its last message says, so it cannot be continued")
        return whole.until(whole.text.rindex(content) + len(content))

    def whole(self, messages: Sequence[Message], *, last: bool) -> Rendered:
        """The conversation, with every turn of the assistant to train on, or the last one alone."""
        whole = self._render(messages, prompt=False)
        spans = list(whole.trained) if self._marks else [span for _, span in self._turns(messages, whole)]
        if not spans:
            raise ConversationRefused(f"{self._where} marks nothing of this conversation as the assistant's")
        return dataclasses.replace(whole, trained=tuple(spans[-1:] if last else spans))

    def turns(self, messages: Sequence[Message], *, last: bool) -> Iterator[tuple[list[str | int], list[str | int]]]:
        """(what comes before, answer) of every turn of the assistant, or of the last one: an answer ends with a special
        token, which may be the end of the text."""
        found = list(self._turns(messages, None))
        for rendered, (begin, end) in found[-1:] if last else found:
            answer = rendered.parts(begin, end)
            if self._eos is not None and not isinstance(answer[-1] if answer else "", int):
                answer.append(self._eos)
            yield rendered.parts(0, begin), answer

    def stop_ids(self) -> list[int]:
        """The tokens that end a turn: the tokenizer's end, and what the template puts behind an answer."""
        (_, answer), *_ = self.turns(_PROBE, last=True)
        ends = [part for part in answer if isinstance(part, int)][-1:]
        return [*dict.fromkeys([*ends, *([] if self._eos is None else [self._eos])])]

    def _turns(self, messages: Sequence[Message], whole: Rendered | None) -> Iterator[tuple[Rendered, tuple[int, int]]]:
        """(the conversation through a turn of the assistant, where in it that turn stands), checked: what is rendered
        of a conversation begins with what is rendered of its begin."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], prompt=True)
            through = self._render(messages[: number + 1], prompt=False)
            fits = through.text.startswith(before.text)
            if not fits or (whole is not None and not whole.text.startswith(_stripped(through))):
                raise ConversationRefused(
                    f"{self._where}: of messages 1 to {number + 1} another text is rendered than of the conversation "
                    "that they begin, so what the assistant wrote cannot be told; give a template with "
                    "{% generation %} marks"
                )
            begin = len(before.text)
            end = max(begin, len(_stripped(through)))
            content = message.get("content", "")
            if content.strip() not in through.text[begin:end]:
                raise ConversationRefused(f"{self._where} leaves out what the assistant says in message {number + 1}")
            yield through, (begin, end)

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> Rendered:
        given = [self._broken(message) for message in messages]
        try:
            raw = self._template.render(self._values | {"messages": given, "add_generation_prompt": prompt})
        except TemplateRefused as error:
            raise TemplateRefused(f"{self._where} is refused: {error}") from None
        except ConversationRefused as error:
            raise ConversationRefused(f"{self._where} does not take this conversation: {error}") from None
        return self._scanned(raw)

    def _broken(self, value: Any) -> Any:
        """The value with a mark within every special token that a text of it spells out."""
        if isinstance(value, str):
            return self._spelled.sub(lambda found: f"{found[0][0]}{BREAK}{found[0][1:]}", value)
        if isinstance(value, dict):
            return {name: self._broken(item) for name, item in value.items()}
        return [self._broken(item) for item in value] if isinstance(value, list) else value

    def _scanned(self, raw: str) -> Rendered:
        """The text without marks, and the places of what they mark."""
        texts: list[str] = []
        tokens, spans, opened = [], [], []
        length = done = 0
        for found in self._pattern.finditer(raw):
            texts.append(raw[done : found.start()])
            length += found.start() - done
            done = found.end()
            mark = found[0]
            if mark == OPEN:
                opened.append(length)
            elif mark == CLOSE:
                spans.append((opened.pop(), length))
            elif mark != BREAK:
                texts.append(mark)
                tokens.append((length, length + len(mark), self._specials[mark]))
                length += len(mark)
        texts.append(raw[done:])
        return Rendered("".join(texts), tuple(tokens), tuple(span for span in spans if span[0] < span[1]))


def _stripped(rendered: Rendered) -> str:
    """The text through its last special token, if nothing but white space follows it."""
    last = max((end for _, end, _ in rendered.tokens), default=0)
    return rendered.text if rendered.text[last:].strip() or not last else rendered.text[:last]
