"""Trains a tokenizer (BPE, unigram or SentencePiece) on text, JSONL, CSV, Parquet or TFDS and writes a folder.

    python tools/train_tokenizer.py text:book.txt --kind=bpe --size=8192 --output=tokenizer

The folder is what `config.data.tokenizer` may name. --help says more; the work is in the package.
"""

import sys

from t5x_like.commands.train_tokenizer import run
from t5x_like.core.errors import UserError


def main(arguments: list[str]) -> int:
    try:
        return run(arguments)
    except UserError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
