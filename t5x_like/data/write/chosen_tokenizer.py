"""Which tokenizer a config means: the vocabulary of a SeqIO task, one that is there, or one that is trained.

It is trained on the text that is not held out, and once: the cache remembers which text each one was trained on. How
it is trained is data/tokenizers/tokenizer_training.py.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from t5x_like.core.errors import UsageError
from t5x_like.data import cache
from t5x_like.data.config import DataConfig
from t5x_like.data.tokenizers import tokenizer_training, vocabularies
from t5x_like.data.write import bad_records, encoding, parts, sources
from t5x_like.data.write.parts import Part, Parts
from t5x_like.storage import paths, patterns

# Of a tokenizer in a bucket these are copied to a temporary folder, up to so many bytes.
_TOKENIZER_FILES, _MOST_STAGED = (".json", ".model", ".txt", ".jinja", ".tiktoken"), 256 << 20


@dataclasses.dataclass(frozen=True)
class Training:
    """A tokenizer of `size` tokens is being trained on up to `text_bytes` bytes of text: long, and nothing to count."""

    size: int
    text_bytes: int


Report = Callable[[Training], None]


def place(config: DataConfig, folder: pathlib.Path, found: Parts, report: Report | None, saved: str) -> str:
    """The name of the tokenizer's folder within the cache at `folder`, where it is put unless it is there.

    found: the text; saved: a folder with the tokenizer, which is then not looked for, nor trained; "" for none
    """
    if config.tokenizer == "task":
        if config.extra_ids:
            raise UsageError(f"config.data.extra_ids={config.extra_ids}: a task says how many it has; leave it at 0")
        if found.vocabulary is None:
            raise UsageError("config.data.tokenizer=task: no seqio: source here has a vocabulary; give a tokenizer")
        return found.vocabulary
    trained = tokenizer_training.parse(config.tokenizer, where="config.data.tokenizer")
    if saved or trained is None:
        given = saved or patterns.one(config.tokenizer, what="config.data.tokenizer=")
        staged = patterns.staged(given, endings=_TOKENIZER_FILES, most=_MOST_STAGED)
        with staged as there:
            vocabulary = vocabularies.load(there)
    else:
        name = _trained(config, folder, list(found.train.values()), trained, report)
        vocabulary = vocabularies.load(str(folder / name))
    vocabulary = vocabulary.with_extra_ids(config.extra_ids)
    name = parts.place_vocabulary(vocabulary, folder, with_chat_template=config.chat.template == "tokenizer")
    if found.vocabulary not in (None, parts.folder_name(vocabulary.with_chat_template(""))):  # its fingerprint
        raise UsageError(f"config.data.tokenizer={config.tokenizer} is not the vocabulary of the SeqIO task; use task")
    return name


def _trained(
    config: DataConfig, folder: pathlib.Path, given: list[Part], trained: tuple[str, int], report: Report | None
) -> str:
    """Trains unless the cache has the tokenizer of the same text; a small file remembers which that was."""
    if any(part.task for part in given):
        raise UsageError(
            f"config.data.tokenizer={config.tokenizer}: needs text; with seqio: sources use task or a path"
        )
    text = [[part.content, part.begin, part.end, parts.reading(config, part)] for part in given]
    recipe = cache.digest([trained, config.tokenizer_training_bytes, text])[:16]
    memory = folder / f"trained-{recipe}.json"
    if memory.is_file():
        name = paths.read_json(str(memory))["tokenizer"]
        if (folder / name / vocabularies.SETTINGS).is_file():
            return name
    limit = config.tokenizer_training_bytes // len(given)
    if report is not None:
        report(Training(trained[1], sum(_most_text(part, limit) for part in given)))
    texts = _training_texts(config, given, limit)
    name = parts.place_vocabulary(tokenizer_training.train(*trained, texts), folder)
    paths.write_json_atomic(str(memory), {"tokenizer": name})
    return name


def _training_texts(config: DataConfig, given: list[Part], limit: int) -> Iterator[str]:
    """Texts of each part from its begin, up to `limit` bytes of each."""
    for part in given:
        pieces = sources.pieces(part.source.kind, part.files, part.begin, part.end)
        # What is skipped here is said where these texts are written.
        tally = bad_records.Tally(part.source.kind, [file.path for file in part.files], rule=config.on_bad_record)
        documents = encoding.read_pieces(
            part.source,
            part.files,
            pieces,
            config.fields,
            config.preprocessors,
            separator=config.separator,
            tally=tally,
        )
        yield from encoding.first_texts(documents, limit)


def _most_text(part: Part, limit: int) -> int:
    """The text of a part is no more than `limit` bytes, nor than its files where these are counted in bytes."""
    return min(limit, part.end - part.begin) if sources.unit(part.source.kind) == "byte" else limit
