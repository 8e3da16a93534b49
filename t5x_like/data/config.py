"""What the `data` section of a config holds. Values only: no file is opened here.

Every field is given by the config (configs/common); there are no defaults in code.
"""

import dataclasses
from typing import Any

from t5x_like.core.config import RESUME_MAY_CHANGE, nearest
from t5x_like.core.errors import UsageError

ON_BAD_RECORD = ("stop", "skip")
PACKINGS = ("concatenate", "examples", "single")
TRUNCATIONS = ("cut", "drop", "end")
ANSWERS = ("joined", "apart")
CHAT_TEMPLATES = ("none", "tokenizer", "chatml", "llama3", "plain", "t5")


@dataclasses.dataclass(frozen=True)
class FieldsConfig:
    """Names of the fields of a record (jsonl, csv, parquet, tfds; a SeqIO feature has its own names).

    text: the field of plain documents. When `inputs` and `targets` are given they are used instead, and a record is
    an example: inputs followed by targets, with the loss on targets only. Both empty: plain documents.
    prompt, chosen, rejected: or none. A record is a pair: two answers to a prompt, the chosen one better; without
        prompt, chosen and rejected are whole dialogues that begin with it (data/write/preferences.py)
    label: the class of `text`, a whole number from 0; or none
    messages: a conversation, a list of {role, content} (data/templates/messages.py); or none. With `inputs` and
        `targets` beside it a record without messages is an example, so that sources of both may be mixed
    """

    text: str
    inputs: str
    targets: str
    prompt: str
    chosen: str
    rejected: str
    label: str
    messages: str

    @property
    def given(self) -> list[str]:
        """The names as fingerprints of caches hold them: the later ones only where there are any."""
        names = list(dataclasses.astuple(self))
        last = max((index for index, name in enumerate(names) if name), default=0)
        return names[: 3 if last < 3 else 7 if last < 7 else 8]

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are read of a record, as far as it has them."""
        if self.rejected:
            return tuple(name for name in (self.prompt, self.chosen, self.rejected) if name)
        if self.messages or self.targets:
            return tuple(name for name in (self.messages, self.inputs, self.targets) if name)
        return (self.text, self.label) if self.label else (self.text,)

    @property
    def beside(self) -> tuple[str, ...]:
        """What is read besides where a record has it: tools, since conversations that offer some are refused."""
        return ("tools",) * bool(self.messages or self.rejected)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a token set stores of each document besides its tokens (data/token_shards.py)."""
        return ("rejected",) * bool(self.rejected) + ("labels",) * bool(self.label)


PLAIN = FieldsConfig(text="text", inputs="", targets="", prompt="", chosen="", rejected="", label="", messages="")


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """Several sources at once, by SeqIO's rate rules.

    sources: {name: source}; empty when `data.source` is the only one
    rates: {name: rate}, relative; empty for those of a SeqIO mixture, else from sizes n:
        min(n * scale, maximum) ** (1 / temperature)
    maximum: cap on n * scale, None for no cap
    counts: what rates count, "examples" (documents, as SeqIO does) or "tokens"
    """

    sources: dict[str, str] = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    rates: dict[str, float]
    maximum: float | None
    scale: float
    temperature: float
    counts: str

    def check(self, path: str) -> None:
        if self.counts not in ("examples", "tokens"):
            raise UsageError(f"{path}.counts={self.counts!r} should be examples or tokens")
        for field in ("scale", "temperature"):
            if not getattr(self, field) > 0:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be above 0")
        if self.maximum is not None and not self.maximum > 0:
            raise UsageError(f"{path}.maximum={self.maximum} should be above 0, or None")
        for name, rate in self.rates.items():
            if not rate >= 0:
                raise UsageError(f"{path}.rates.{name}={rate} should be a number of at least 0")


@dataclasses.dataclass(frozen=True)
class SpanCorruptionConfig:
    """How much of a text is noise (features "span_corruption"; T5: 0.15 and 3.0).

    noise_density: share of the tokens that are noise; mean_span_length: tokens of a span of noise, on the average
    """

    noise_density: float
    mean_span_length: float


T5_NOISE = SpanCorruptionConfig(noise_density=0.15, mean_span_length=3.0)  # what a config says that has no noise


@dataclasses.dataclass(frozen=True)
class TruncateConfig:
    """What becomes of an example that is longer than its row.

    rule: "cut": inputs give way until `min_targets` tokens of the targets have room, targets lose their end; "drop":
        it is left out; "end": what is behind the row is lost, targets first (the rule of runs of formats 1 and 2)
    inputs: where "cut" takes tokens from the inputs, "left" (their begin; BOS stays) or "right" (their end)
    min_targets: tokens of its targets that a cut example keeps if it has so many; 0 for half of the row
    """

    rule: str
    inputs: str
    min_targets: int

    def check(self, path: str) -> None:
        if self.rule not in TRUNCATIONS:
            raise UsageError(f"{path}.rule={self.rule!r} is unknown; {nearest(self.rule, TRUNCATIONS)}")
        if self.inputs not in ("left", "right"):
            raise UsageError(f"{path}.inputs={self.inputs!r} should be left or right, where inputs lose tokens")
        if self.min_targets < 0:
            raise UsageError(f"{path}.min_targets={self.min_targets} should be at least 0, which is half of the row")
        if self.rule != "cut" and (self.inputs, self.min_targets) != ("left", 0):
            raise UsageError(
                f"{path}.rule={self.rule!r} reads neither inputs nor min_targets; leave them at 'left' and 0"
            )


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """How conversations (fields.messages) and examples (fields.inputs and targets) are written as text.

    template: "none" (examples alone, inputs followed by targets), "tokenizer" (the tokenizer's own chat template),
        "chatml", "llama3", "plain" or "t5" (data/templates/named.py)
    train_on: "assistant" (every turn of the assistant) or "last" (its last turn)
    system: what a conversation that has no message of the system begins with; "" for none
    """

    template: str
    train_on: str
    system: str

    def check(self, path: str) -> None:
        if self.template not in CHAT_TEMPLATES:
            raise UsageError(f"{path}.template={self.template!r} is unknown; {nearest(self.template, CHAT_TEMPLATES)}")
        if self.train_on not in ("assistant", "last"):
            raise UsageError(f"{path}.train_on={self.train_on!r} should be assistant (every turn of it) or last")
        if self.template == "none" and (self.train_on, self.system) != ("assistant", ""):
            raise UsageError(
                f"{path}.train_on and system have no effect with template='none'; leave them at 'assistant' and ''"
            )


NO_CHAT = ChatConfig(template="none", train_on="assistant", system="")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, held-out text and the shape of a batch.

    source: `KIND:PATH`, KIND one of text, lines, jsonl, csv, parquet, arrow, tfds, seqio (docs/data.md); PATH is a
        file, a folder, a glob or a list of these, local or gs://
    csv_separator: the character between the fields of all csv sources (a tab may be spelled "\\t"); "" for the one by
        which the header names the fields that are read
    on_bad_record: what happens at a record that cannot be used (no such field, null, not text, not UTF-8, not JSON):
        "stop" names it, "skip" leaves it out and counts it; of a source at most max_bad_share of the records
    preprocessors: names in data/write/preprocessors.py, applied to every text in this order
    tokenizer: `bytes`, a path (tokenizer.json, SentencePiece model, or a folder), `train:bpe:SIZE`,
        `train:unigram:SIZE`, `train:sentencepiece:SIZE`, or `task` (the vocabulary of a SeqIO task)
    extra_ids: sentinels <extra_id_0>, <extra_id_1>, ... added to the tokenizer: <extra_id_0> is the last id, the others
        come before it. The vocabulary has SIZE + extra_ids tokens. 0 with a tokenizer that has its own
    tokenizer_training_bytes: how much training text a tokenizer is trained on at most, in bytes of UTF-8; of several
        sources each gives an equal part of it
    validation: a source, or the fraction of the bytes that is cut off at the end ("0.1"), or "" for none
    validation_stride: tokens between two rows of held-out text; 0 for `length`. Less than `length` makes rows overlap:
        each token is still scored once, with more context before it
    validation_batches: at most so many batches of each held-out set, 0 for all
    batch_size: rows of a global batch; length: tokens of a row (T), those of the decoder where there is an encoder
    features: what rows become, a name in data/read/features.py
    encoder_length: tokens of a row of the encoder (S), 0 without one
    start_token: what a decoder with an encoder begins with: "pad" (id 0, as T5), "bos", "eos" or an id
    packing: "concatenate" (one stream, cut into rows), "examples" (whole examples, best fit into rows) or "single"
        (one example a row)
    chat: how conversations become text
    answers: how a decoder's targets and answers are encoded: "joined", as they stand behind their inputs or prompt
        (data/tokenizers/behind.py), or "apart", as texts of their own (the rule of runs of formats 1 to 4). Targets of
        an encoder-decoder are texts of their own
    truncate: what becomes of an example that is longer than its row (whole examples: not packing "concatenate")
    attend_across_documents: documents of one row see each other (then a batch has no segment_ids)
    prefix: the inputs of an example are seen by all of its tokens, not by those after them alone (a prefix LM,
        arXiv 1910.10683, section 3.2.1); for whole examples, features "causal"
    prefetch: batches read ahead of the step
    workers: processes of `prepare`, 0 for one per core
    cache: folder of the token cache, local or gs://; "" for `cache/` in the workdir
    verify: compare the checksums of all cache files when they are opened
    """

    # What sources, tokenizer and held-out text hold is told by the fingerprint of the data, which a resume compares;
    # where they lie may change.
    source: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    mixture: MixtureConfig
    fields: FieldsConfig
    chat: ChatConfig
    # As of truncate below.
    answers: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    csv_separator: str
    on_bad_record: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    max_bad_share: float = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    preprocessors: tuple[str, ...]
    tokenizer: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    extra_ids: int
    tokenizer_training_bytes: int
    validation: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    validation_stride: int
    validation_batches: int
    batch_size: int
    length: int
    features: str
    encoder_length: int
    start_token: str
    span_corruption: SpanCorruptionConfig
    packing: str
    # Where it decides any row the fingerprint of the data tells, which a resume compares.
    truncate: TruncateConfig = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    attend_across_documents: bool
    prefix: bool
    prefetch: int = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    workers: int = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    cache: str = dataclasses.field(metadata=RESUME_MAY_CHANGE)
    verify: bool = dataclasses.field(metadata=RESUME_MAY_CHANGE)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a token set stores besides tokens (data/token_shards.py)."""
        marked = self.chats and not self.answers_apart and not self.fields.rejected
        return ("trained",) if marked else self.fields.columns

    @property
    def chats(self) -> bool:
        """Whether records are written by a chat template."""
        return self.chat.template != "none"

    @property
    def answers_apart(self) -> bool:
        """Whether each turn of the assistant is an example of its own: the target of what comes before."""
        return self.features == "source_target"

    @property
    def reading(self) -> dict[str, Any]:
        """What `chat` and `answers` decide of the tokens; {} where they decide nothing."""
        given = {"chat": [*dataclasses.astuple(self.chat), self.answers_apart]} if self.chats else {}
        return given | ({"answers": "joined"} if self.joined else {})

    @property
    def joined(self) -> bool:
        """Whether answers are encoded as they stand behind their prompts; a conversation always is."""
        given = (self.source, *self.mixture.sources.values())
        texts = self.tokenizer != "task" and any(source.startswith("seqio:") for source in given)
        behind = self.fields.rejected or (not self.chats and (self.fields.targets or texts))
        return bool(behind) and self.answers == "joined" and not (self.answers_apart or self.encoder_length)

    def _check_chat(self, path: str) -> None:
        fields = self.fields
        if fields.messages and not self.chats:
            raise UsageError(f"{path}.fields.messages={fields.messages!r} needs {path}.chat.template, such as 'plain'")
        if self.chats and not (fields.messages or fields.targets or fields.rejected):
            raise UsageError(
                f"{path}.chat.template={self.chat.template!r} needs {path}.fields.messages, or inputs and targets, or "
                "chosen and rejected"
            )
        if self.chat.template == "t5" and not (self.answers_apart or self.encoder_length):
            raise UsageError(
                f"{path}.chat.template='t5' is for encoder-decoders ({path}.features='source_target', or pairs with "
                f"{path}.encoder_length); use 'plain'"
            )
        written = ("pairs", "pair_texts") if fields.rejected else ("causal", "source_target")
        if self.chats and self.features not in written:
            raise UsageError(
                f"{path}.chat.template={self.chat.template!r} does not go with features={self.features!r}; "
                f"use {' or '.join(map(repr, written))}"
            )

    def check(self, path: str) -> None:
        self._check_chat(path)
        ranges = {"batch_size": 1, "length": 1, "tokenizer_training_bytes": 1}
        ranges |= {"validation_batches": 0, "validation_stride": 0, "prefetch": 0, "workers": 0}
        for name, least in ranges.items():
            if getattr(self, name) < least:
                raise UsageError(f"{path}.{name}={getattr(self, name)} should be at least {least}")
        if self.truncate.min_targets > self.length:
            raise UsageError(
                f"{path}.truncate.min_targets={self.truncate.min_targets} should be at most length={self.length}"
            )
        if self.validation_stride > self.length:
            raise UsageError(
                f"{path}.validation_stride={self.validation_stride} should lie between 0 and length={self.length}"
            )
        if self.csv_separator:
            self._check_separator(f"{path}.csv_separator={self.csv_separator!r}")
        if self.on_bad_record not in ON_BAD_RECORD:
            known = nearest(self.on_bad_record, ON_BAD_RECORD)
            raise UsageError(f"{path}.on_bad_record={self.on_bad_record!r} is unknown; {known}")
        if not 0 <= self.max_bad_share <= 1:
            raise UsageError(f"{path}.max_bad_share={self.max_bad_share} should lie between 0 and 1")
        if self.answers not in ANSWERS:
            raise UsageError(f"{path}.answers={self.answers!r} is unknown; {nearest(self.answers, ANSWERS)}")
        if self.packing not in PACKINGS:
            raise UsageError(f"{path}.packing={self.packing!r} is unknown; {nearest(self.packing, PACKINGS)}")

    def _check_separator(self, given: str) -> None:
        if len(self.separator) != 1 or self.separator in '"\r\n\0':
            raise UsageError(f'{given} should be one character, such as ";" or "\\t", and no quote or end of a line')
        if not any(
            source.startswith("csv:") for source in (self.source, self.validation, *self.mixture.sources.values())
        ):
            raise UsageError(f"{given} is for csv: sources, and there is none; leave it empty")

    @property
    def separator(self) -> str:
        """`csv_separator` as it stands in a file: a tab is hard to type."""
        return self.csv_separator.replace("\\t", "\t")
