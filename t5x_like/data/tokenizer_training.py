"""Training a tokenizer: byte-level BPE and unigram through `tokenizers`, or a SentencePiece model with byte fallback.

All three can write any text (no unknown token) and read it back unchanged. The same text gives the same tokenizer:
the libraries run on one thread here, since their threads add floating-point counts in any order.
Not here: which text is used (data/prepare.py leaves held-out text out).
"""

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

from t5x_like.core.config import nearest
from t5x_like.core.errors import UserError
from t5x_like.data import vocabularies

END_OF_TEXT = "<|endoftext|>"
_SENTENCE_BYTES = 4096  # SentencePiece drops longer sentences unless told otherwise, and is quadratic in some of them


def parse(tokenizer: str) -> tuple[str, int] | None:
    """("bpe", 1024) of `train:bpe:1024`; None when `tokenizer` is not to be trained."""
    if not tokenizer.startswith("train:"):
        return None
    _, kind, size = [*tokenizer.split(":", 2), "", ""][:3]
    if kind not in TRAINERS:
        raise UserError(f"config.data.tokenizer={tokenizer}: kind {kind!r} is unknown; {nearest(kind, TRAINERS)}")
    if not size.isdecimal() or int(size) < 260:
        raise UserError(f"config.data.tokenizer={tokenizer}: needs a size of at least 260 (256 bytes and special ones)")
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
    return _byte_level(models.BPE(), trainer, texts)


def _unigram(size: int, texts: Iterable[str]) -> vocabularies.Vocabulary:
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    return _byte_level(models.Unigram(), trainer, texts)


def _byte_level(model: object, trainer: object, texts: Iterable[str]) -> vocabularies.Vocabulary:
    """GPT-2's pre-tokenizer and byte letters around `model`."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    try:
        tokenizer.train_from_iterator(_lines(texts), trainer)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"the tokenizer could not be trained: {str(error).splitlines()[0]}") from None
    content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1).encode()
    return vocabularies.tokenizers_vocabulary(content, pathlib.Path("tokenizer.json"), (None, END_OF_TEXT))


def _sentencepiece(size: int, texts: Iterable[str]) -> vocabularies.Vocabulary:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_short_lines(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * _SENTENCE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"the tokenizer could not be trained: {str(error).splitlines()[-1]}") from None
    return vocabularies.sentencepiece_vocabulary(model.getvalue(), pathlib.Path("tokenizer.model"), extra_ids=0)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines with their ends: a document is cut where a word would not be (counts stay the same but at blank lines)."""
    for text in texts:
        begin = 0
        while begin < len(text):
            end = text.find("\n", begin) + 1 or len(text)
            yield text[begin:end]
            begin = end


def _short_lines(texts: Iterable[str]) -> Iterator[str]:
    for line in _lines(texts):
        line = line.rstrip("\n")
        for begin in range(0, len(line), _SENTENCE_BYTES // 4):  # a character has at most 4 bytes
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
