"""Trains a tokenizer on the text of sources and saves it as a folder; the program is `tools/train_tokenizer.py`.

No command of `t5x_like`: `config.data.tokenizer="train:bpe:8192"` trains one as a part of `prepare`.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import Parser
from t5x_like.storage import paths


def run(arguments: Sequence[str]) -> int:
    parser = Parser(prog="train_tokenizer", description=__doc__)
    parser.add_argument("sources", nargs="+", help="KIND:PATH, KIND one of text, lines, jsonl, csv, parquet, tfds")
    parser.add_argument("--kind", default="bpe", help="bpe (default), unigram or sentencepiece")
    parser.add_argument("--size", type=int, default=8192, help="tokens, with 256 bytes and the special ones")
    parser.add_argument("--field", default="text", help="field of a record that holds the text (default: text)")
    parser.add_argument("--bytes", type=int, default=100_000_000, help="bytes (UTF-8) of each source to read at most")
    parser.add_argument("--output", required=True, help="folder to write; a config names it as config.data.tokenizer")
    options = parser.parse_args(arguments)

    from t5x_like.data.tokenizers import tokenizer_training

    parsed = tokenizer_training.parse(f"train:{options.kind}:{options.size}", where="--kind and --size")
    if parsed is None or options.bytes < 1:
        raise UsageError(f"train_tokenizer: --bytes={options.bytes} should be at least 1")
    output = paths.normal(options.output)
    _check_writable(output)
    texts = _texts(options.sources, options.field, options.bytes)
    vocabulary = tokenizer_training.train(*parsed, texts)
    staged = paths.StagedDirectory(output)
    vocabulary.save(staged.local_path)
    staged.close()
    print(f"{output}: {options.kind}, {vocabulary.size} tokens, fingerprint {vocabulary.fingerprint[:16]}")
    return 0


def _check_writable(output: str) -> None:
    """Better said before minutes of training than after."""
    if paths.is_remote(output):
        paths.make_directory(output)
        return
    path = pathlib.Path(output)
    place = next(each for each in (path, *path.parents) if each.exists() or each.is_symlink())
    if not place.is_dir():
        raise UsageError(f"train_tokenizer: --output={output}: {place} is no folder; name another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"train_tokenizer: --output={output}: {place} is not writable; name another")


def _texts(names: Sequence[str], field: str, limit: int) -> Iterator[str]:
    from t5x_like.data.config import PLAIN
    from t5x_like.data.write import encoding, sources

    for name in names:
        source = sources.parse(name, where="source")
        files = sources.files(source, where="source")
        pieces = sources.pieces(source.kind, files, 0, sum(file.measure for file in files))
        fields = dataclasses.replace(PLAIN, text=field)
        documents = encoding.read_pieces(source, files, pieces, fields, ())
        yield from encoding.first_texts(documents, limit)
