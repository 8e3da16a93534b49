"""A small world of text for the tests of data: configs, files in several scripts, and a prepared cache."""

import json
import os

from configs import common
from t5x_like.core.config import build
from t5x_like.core.errors import UserError
from t5x_like.data.config import DataConfig
from t5x_like.data.read.loader import open_data
from t5x_like.data.write.prepare import prepare
from t5x_like.storage import paths

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Der schnelle braune Fuchs springt \u00fcber den faulen Hund.",
    "\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002\u540d\u524d\u306f\u307e\u3060\u7121\u3044\u3002",
    "\u0411\u044b\u0441\u0442\u0440\u0430\u044f \u043b\u0438\u0441\u0430 \u043f\u0440\u044b\u0433\u0430\u0435\u0442.",
    "Emoji: \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 and a ligature \ufb01 and e\u0301 decomposed.",
    "Separators \u2028 and \u0085 are inside a line.   Three   spaces,\ttabs.",
    "def f(x):\n    return [x, 12345, 3.14]\n",
)

END = {"rule": "end"}  # config.data.truncate of earlier formats: what is behind the row is lost


def config(**overrides):
    """A DataConfig from the project's own defaults, small; `mixture` and `fields` take partial dicts."""
    section = common.config().data.to_dict() | {"tokenizer": "bytes", "length": 16, "batch_size": 4, "workers": 1}
    for name, value in overrides.items():
        section[name] = section[name] | value if isinstance(section[name], dict) else value
    return build(DataConfig, section, path="config.data")


def paragraphs(count):
    """`count` different paragraphs of 1 to 4 sentences."""
    return [
        " ".join(SENTENCES[(number * 5 + part) % len(SENTENCES)] for part in range(1 + number % 4)) + f" ({number})"
        for number in range(count)
    ]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return f"jsonl:{path}"


def open_below(folder):
    """The files below `folder` that this process has open."""
    places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    links = [os.readlink(place) for place in places if os.path.lexists(place)]
    return [link for link in links if link.startswith(f"{folder}/")]


def make_read_only(monkeypatch, folder):
    """As if a folder lay on a read-only disk, for this process; with permissions alone root would still write."""
    writing = paths.writing

    def refused(path):
        if path.startswith(f"{folder}/"):
            raise UserError(f"{path} cannot be written (Read-only file system); free disk space or check permissions")
        return writing(path)

    monkeypatch.setattr(paths, "writing", refused)


def opened(chosen, cache_dir, seed=0):
    """Prepares and opens."""
    prepare(chosen, str(cache_dir), report=None)
    return open_data(chosen, cache_dir=str(cache_dir), seed=seed)
