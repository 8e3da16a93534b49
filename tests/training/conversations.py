"""Packed rows of conversations as they come from a file, for tests of whole steps."""

import contextlib
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from t5x_like.core.config import build
from t5x_like.data.config import DataConfig
from t5x_like.data.read.loader import open_data
from t5x_like.data.write.prepare import prepare

_WORDS = ("yes", "no, thank you", "why", "a b c d e")
_ROLES = ("user", "assistant", "user", "assistant")


def rows(section: dict[str, Any]) -> dict[str, np.ndarray]:
    """Eight rows of the data that this section of a config describes but for its source."""
    said = [(_WORDS[n % 4] * (1 + n % 2), _WORDS[n * 3 % 4], _WORDS[(n + 1) % 3], _WORDS[n % 3]) for n in range(24)]
    lines = [[{"role": role, "content": text} for role, text in zip(_ROLES, texts, strict=True)] for texts in said]
    lines = [json.dumps({"messages": messages[: 2 + number % 3]}) for number, messages in enumerate(lines)]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "a.jsonl")
        path.write_text("\n".join(lines))
        given = section | {"source": f"jsonl:{path}", "validation": "", "workers": 1}
        config = build(DataConfig, given, path="config.data")
        prepare(config, folder, report=None)
        with contextlib.closing(open_data(config, cache_dir=folder, seed=0)) as data:
            return data.rows(0, np.arange(8))
