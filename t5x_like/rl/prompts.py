"""Prompts with the answers that verifiers expect: of a source of ours, or of a function of the config file.

The prompts of an iteration are a pure function of (config, seed, iteration). A record is an example as instruction
tuning reads it: `config.data.fields.inputs` is the prompt, `targets` the expected answer. Prompts are encoded as those
examples are: for a decoder BOS (where there is one) and the prompt, for an encoder also EOS.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.config import DataConfig
from t5x_like.data.read.permutation import permute
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.data.write import bad_records, encoding, preprocessors, sources

Generate = Callable[[int, int], tuple[str, str]]
# Held-out prompts of a generator have seeds that no run has: those of runs are below 2^32.
HELD_OUT_SEED = 1 << 32


class Text(NamedTuple):
    """A prompt and the answer that verifiers expect."""

    prompt: str
    expected: str


class Prompts(Protocol):
    """The prompts of a run, from index 0 on. `fingerprint`: of what they are made from."""

    @property
    def fingerprint(self) -> str: ...

    def at(self, index: int) -> Text: ...


@dataclasses.dataclass(frozen=True)
class Listed:
    """Texts in an order that is another one in each epoch."""

    texts: Sequence[Text]
    seed: int
    fingerprint: str

    def at(self, index: int) -> Text:
        epoch, position = divmod(index, len(self.texts))
        return self.texts[int(permute(np.array([position]), len(self.texts), f"{self.seed}/prompts/{epoch}")[0])]


@dataclasses.dataclass(frozen=True)
class Generated:
    """Texts of a function of (seed, index); `fingerprint` is what a config stores of it."""

    function: Generate
    seed: int
    fingerprint: str

    def at(self, index: int) -> Text:
        try:
            prompt, expected = self.function(self.seed, index)
        except Exception as error:  # whatever a file of a user may do wrong
            line = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"config.rl.generate: {self.fingerprint} at ({self.seed}, {index}) raised {line}") from None
        if not (isinstance(prompt, str) and isinstance(expected, str) and prompt):
            raise UserError(
                f"config.rl.generate: {self.fingerprint} at ({self.seed}, {index}) should give two texts, a prompt and "
                f"the expected answer; it gave {(prompt, expected)!r:.80}"
            )
        return Text(prompt, expected)


def read(config: DataConfig, source: str, *, where: str, report: Callable[[str], None]) -> list[Text]:
    """All prompts of a source, in its order. Raises UserError where it has none, and where too many records are bad;
    `report` gets a line about those that are left out."""
    if not config.fields.inputs:
        raise UsageError(
            "config.data.fields.inputs is empty; name the field of the prompt, and as config.data.fields.targets that "
            "of the answer that verifiers expect"
        )
    if config.fields.messages:
        raise UsageError(
            f"config.data.fields.messages={config.fields.messages!r}: prompts are those of examples; leave it empty"
        )
    preprocessors.check(config.preprocessors, config.fields)
    parsed = sources.parse(source, where=where)
    if parsed.kind in ("seqio", "text", "lines"):
        raise UsageError(f"{where}={source}: prompts are records with fields; use jsonl, csv, parquet, arrow or tfds")
    files = sources.files(parsed, where=where)
    pieces = sources.pieces(parsed.kind, files, 0, sum(file.measure for file in files))
    names = [file.path for file in files]
    tally = bad_records.Tally(parsed.kind, names, rule=config.on_bad_record)
    documents = list(
        encoding.read_pieces(
            parsed, files, pieces, config.fields, config.preprocessors, separator=config.separator, tally=tally
        )
    )
    if tally.count:
        index = tally.facts() | {"documents": len(documents), "skipped": 0}
        bad_records.check_share(source, [(index, names)], config.max_bad_share)
        first = bad_records.lines(index, parsed.kind, names)[0]
        report(f"{source}: {tally.count} bad records are left out, the first is {first}")
    found = [Text(document.inputs, document.text) for _, _, document in documents if document.inputs]
    if not found:
        raise UserError(f"{where}={source}: no record of it has a prompt (config.data.fields.inputs)")
    return found


def digest(texts: Sequence[Text]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text.prompt)} {len(text.expected)} {text.prompt}{text.expected}".encode())
    return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Token ids of prompts, at most `room` of them; what is longer is treated as config.data.truncate says.

    encoder: whether an encoder reads them, which wants EOS at the end
    """

    vocabulary: Vocabulary
    room: int
    encoder: bool
    config: DataConfig

    def ids(self, text: Text) -> list[int]:
        """Raises UserError for a prompt without room that may not be cut."""
        vocabulary = self.vocabulary
        ids = vocabulary.encode(text.prompt, bos=True, eos=self.encoder)
        if not ids:
            raise UserError(
                f"the prompt {text.prompt!r:.60} has no token, and its tokenizer no BOS, so an answer follows nothing; "
                "give it a text, or leave it out by config.data.truncate.rule='drop'"
            )
        if len(ids) <= self.room:
            return ids
        before = int(vocabulary.bos_id is not None)
        after = int(self.encoder and vocabulary.eos_id is not None)
        if self.config.truncate.rule != "cut" or self.room <= before + after:
            raise UserError(
                f"the prompt {text.prompt!r:.60} has {len(ids)} tokens, and there is room for {self.room}: config.data."
                f"{'encoder_length' if self.encoder else 'length less config.rl.new_tokens'}; make that larger, or let "
                "it be cut by config.data.truncate.rule='cut'"
            )
        left = self.config.truncate.inputs == "left"
        middle = ids[before : len(ids) - after]
        kept = self.room - before - after
        middle = middle[-kept:] if left else middle[:kept]
        return [*ids[:before], *middle, *ids[len(ids) - after :]]


def fitting(texts: Sequence[Text], encoder: Encoder, *, drop: bool) -> Iterator[Text]:
    """The texts whose prompts have room; with `drop` others are left out, else they are an error or cut."""
    for text in texts:
        try:
            encoder.ids(text)
        except UserError:
            if not drop:
                raise
            continue
        yield text
