"""A model of another program that is there to be read, whatever its files: one form for all of them."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from t5x_like.convert import checksums, huggingface, llama2c, staging, t5x
from t5x_like.convert.mapping import Source, Table
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig
from t5x_like.storage import paths


@dataclasses.dataclass(frozen=True)
class Foreign:
    """form: in words. fields: of our model's section. tokenizer: its files. extra: what goes into the metadata.

    check(): compares its files with their checksums, where it has any; for whoever reads all of it.
    """

    path: str
    form: str
    family: str
    fields: Mapping[str, Any]
    table: Callable[[ModelConfig], Table]
    tensors: Source
    tokenizer: Sequence[str]
    extra: Mapping[str, Any]
    check: Callable[[], None] = lambda: None


def is_foreign(path: str) -> bool:
    """Whether a path looks like a model of another program: a file, or a folder as Hugging Face or T5X write it."""
    if paths.is_remote(path):
        return _is_remote_model(paths.normal(path))
    place = paths.normal(path)
    return huggingface.is_folder(path) or os.path.isfile(place) or t5x.is_checkpoint(place)


def _is_remote_model(path: str) -> bool:
    """As `is_foreign`, for a gs:// path, in two or three requests."""
    names = paths.list_names(path)
    if not names:
        return paths.exists(path)
    return t5x.FILE in names or huggingface.is_folder(path)


@contextlib.contextmanager
def open_foreign(path: str) -> Iterator[Foreign]:
    """A model in a bucket is copied to a temporary folder first. Raises UserError for a path that no reader knows."""
    if paths.is_remote(path):
        place = paths.normal(path)
        with staging.staged(place, whole=t5x.FILE in paths.list_names(place)) as copy, open_foreign(copy) as found:
            yield dataclasses.replace(found, path=place)
        return
    if huggingface.is_folder(path):
        with _open_folder(huggingface.Folder(path)) as found:
            yield found
        return
    place = paths.normal(path)
    if t5x.is_checkpoint(place):
        fields, tensors = t5x.read(place)
        yield Foreign(place, "t5x", "t5", fields, t5x.table, tensors, _beside(place), {})
        return
    with llama2c.open_checkpoint(place) as (fields, tensors):
        yield Foreign(place, "llama2.c", "llama", fields, llama2c.table, tensors, _beside(place), {})


@contextlib.contextmanager
def _open_folder(folder: huggingface.Folder) -> Iterator[Foreign]:
    with folder.tensors() as tensors:
        ids = {name: folder.settings[name] for name in huggingface.TOKEN_IDS if name in folder.settings}
        yield Foreign(
            folder.path,
            f"huggingface {folder.name}",
            folder.name,
            folder.section(tensors.described().keys()),
            folder.family.table,
            tensors,
            folder.tokenizer_files(),
            {"generation_config": folder.generation(), "token_ids": ids},
            functools.partial(checksums.check, folder.path),
        )


def _beside(path: str) -> list[str]:
    """The one tokenizer that lies beside a file, if there is one: tokenizer.json or a SentencePiece model."""
    folder = os.path.dirname(path)
    found = [name for name in sorted(os.listdir(folder)) if name == "tokenizer.json" or name.endswith(".model")]
    if len(found) > 1:
        raise UserError(f"{folder} has several tokenizers ({', '.join(found)}); leave one beside {path}")
    settings = [name for name in huggingface.TOKENIZER_FILES if "token" in name and name.endswith("_config.json")]
    beside = [name for name in settings if found and os.path.isfile(os.path.join(folder, name))]
    return [os.path.join(folder, name) for name in (*found, *beside)]
