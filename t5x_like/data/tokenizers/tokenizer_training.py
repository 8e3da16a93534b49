"""Training a tokenizer: byte-level BPE and unigram (tokenizer.json), or a SentencePiece model with byte fallback.

All three can write any text (no unknown token) and read it back unchanged, but for U+2581, which SentencePiece gives
back as a space. The same text gives the same tokenizer, so the libraries run on one thread here.
Not here: which text is used (data/write/chosen_tokenizer.py leaves held-out text out).
"""

import collections
import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.tokenizers import sentencepiece_engine, tokenizers_engine, vocabularies, word_cache

END_OF_TEXT = "<|endoftext|>"
_SENTENCE_BYTES = 4096  # SentencePiece leaves longer sentences out


def parse(tokenizer: str, *, where: str) -> tuple[str, int] | None:
    """("bpe", 1024) of `train:bpe:1024`; None when `tokenizer` is not to be trained. `where`: for messages."""
    if not tokenizer.startswith("train:"):
        return None
    _, kind, size = [*tokenizer.split(":", 2), "", ""][:3]
    if kind not in TRAINERS:
        raise UsageError(f"{where}={tokenizer}: kind {kind!r} is unknown; {nearest(kind, TRAINERS)}")
    if not size.isdecimal() or int(size) < 260:
        raise UsageError(f"{where}={tokenizer}: needs a size of at least 260 (256 bytes and special ones)")
    return kind, int(size)


def train(kind: str, size: int, texts: Iterable[str]) -> vocabularies.Vocabulary:
    """A vocabulary of at most `size` tokens. Short text may give fewer: UserError when it cannot reach the size."""
    with _one_thread():
        vocabulary = TRAINERS[kind](size, texts)
    if vocabulary.size != size:
        raise UserError(
            f"a {kind} tokenizer of {size} tokens was asked for, and the training text gave {vocabulary.size}; "
            "give a smaller size or more text"
        )
    return vocabulary


def _bpe(size: int, texts: Iterable[str]) -> vocabularies.Vocabulary:
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = _byte_level(models.BPE())
    tokenizer.train_from_iterator(texts, trainer)
    return _finished(tokenizer)


def _unigram(size: int, texts: Iterable[str]) -> vocabularies.Vocabulary:
    """SentencePiece's trainer over counted words: that of `tokenizers` gives other pieces in every process."""
    import sentencepiece
    from tokenizers import AddedToken, models, pre_tokenizers

    tokenizer = _byte_level(models.BPE())
    counts = collections.Counter(pre_tokenizers.ByteLevel.alphabet())  # a piece for every byte, seen or not
    for text in texts:
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    model = _run_sentencepiece(
        (f"{word}\t{count}" for word, count in sorted(counts.items()) if len(word) <= _SENTENCE_BYTES),
        size,
        {
            "input_format": "tsv",
            "add_dummy_prefix": False,
            "character_coverage": 1.0,
            "split_by_whitespace": False,
            "split_by_unicode_script": False,
            "split_by_number": False,
            "bos_id": -1,
            "eos_id": -1,
        },
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(processor.id_to_piece(token), processor.get_score(token)) for token in range(1, size)]
    tokenizer.model = models.Unigram(pieces, unk_id=None, byte_fallback=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return _finished(tokenizer)


def _byte_level(model: Any) -> Any:
    """A tokenizer over GPT-2's byte letters, words cut as Llama 3 cuts them (7% shorter than GPT-2's on plays)."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    cut = pre_tokenizers.Split(tokenizers.Regex(word_cache.LLAMA3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finished(tokenizer: Any) -> vocabularies.Vocabulary:
    content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()
    file = tokenizers_engine.read(content, pathlib.Path("tokenizer.json"), (None, END_OF_TEXT))
    return vocabularies.Vocabulary(file)


def _sentencepiece(size: int, texts: Iterable[str]) -> vocabularies.Vocabulary:
    settings = {"byte_fallback": True, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    model = _run_sentencepiece(_short_lines(texts), size, settings)
    file = sentencepiece_engine.read(model, pathlib.Path("tokenizer.model"), extra_ids=0)
    return vocabularies.Vocabulary(file)


def _run_sentencepiece(sentences: Iterator[str], size: int, settings: Mapping[str, Any]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            normalization_rule_name="identity",
            max_sentence_length=2 * _SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]  # without the place in the library's source
        raise UserError(f"a tokenizer of {size} tokens could not be trained: {reason}") from None
    return model.getvalue()


def _short_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, cut into at most _SENTENCE_BYTES (a character has at most 4 bytes)."""
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), _SENTENCE_BYTES // 4):
                yield line[begin : begin + _SENTENCE_BYTES // 4]


TRAINERS: dict[str, Callable[[int, Iterable[str]], vocabularies.Vocabulary]] = {
    "bpe": _bpe,
    "unigram": _unigram,
    "sentencepiece": _sentencepiece,
}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
