"""A model that is there to be read, ours or another program's, by one form: its config, tokenizer and parameters."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from t5x_like.convert import native
from t5x_like.convert.convert import load_params, open_reading
from t5x_like.convert.foreign import is_foreign, open_foreign
from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.core.types import Tree
from t5x_like.data.tokenizers import vocabularies
from t5x_like.models import config as model_config
from t5x_like.models.config import ModelConfig
from t5x_like.storage import model_directory, paths, patterns
from t5x_like.storage.base import restore_whole
from t5x_like.storage.reading import check_templates


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """One checkpoint of ours, or one model of another program.

    directory: of it alone. tokenizer: the fingerprint, None where it is not known; tokenizer_folder: where it lies.
    start_token: config.data.start_token of the run that trained it, "pad" where it is no run of ours.
    read(templates): the parameters of a tree of jax.ShapeDtypeStruct, which may be a part of the model's, each placed
    and typed as its template says. Raises UserError for a path or a shape that the model does not have.
    """

    directory: str
    step: int | None
    config: ModelConfig
    tokenizer: str | None
    tokenizer_folder: str | None
    start_token: str
    read: Callable[[Tree], dict[str, Any]]


def open_model(directory: str, *, adapters: bool = False) -> StoredModel:
    """The newest checkpoint of a workdir or model directory, a checkpoint itself, or a Hugging Face folder.

    adapters: whether it may hold an adapter, for who reads its notes alone. Reads no parameters. Raises UserError
    where there is no model.
    """
    directory = patterns.one(directory)
    if is_foreign(directory):
        return _foreign(directory)
    place = model_directory.locate(directory)
    note = model_directory.read_metadata(place.checkpoint)
    if not adapters and (note["config"].get("adapter") or {}).get("name", "none") != "none":
        raise UserError(
            f"{place.checkpoint} is an adapter, and a whole model is wanted here; merge it by "
            f"`t5x_like convert {directory} MODEL --to=native` and give MODEL"
        )
    return StoredModel(
        directory=place.checkpoint,
        step=note["step"],
        config=model_config.resolve(note["config"]["model"]),
        tokenizer=note.get("provenance", {}).get("tokenizer"),
        tokenizer_folder=place.tokenizer,
        start_token=note["config"].get("data", {}).get("start_token", "pad"),
        read=functools.partial(restore_whole, place.checkpoint, native.PARAMS),
    )


def _foreign(directory: str) -> StoredModel:
    with open_foreign(directory) as foreign:
        # A folder may hold settings alone, of a tokenizer that needs no files: then nothing can be compared.
        files = [file for file in foreign.tokenizer if file.endswith((".model", "tokenizer.json"))]
        folder = os.path.dirname(files[0]) if files else None
        there = foreign.path if paths.is_directory(foreign.path) else paths.parent(foreign.path)
        return StoredModel(
            directory=foreign.path,
            step=None,
            config=open_reading(foreign, dtype=None)[0],
            tokenizer=vocabularies.load(folder).fingerprint if folder else None,
            tokenizer_folder=there if folder else None,
            start_token="pad",
            read=functools.partial(_read_foreign, directory),
        )


def _read_foreign(directory: str, templates: Tree) -> dict[str, Any]:
    wanted = tree.flatten(templates)

    def checked(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
        there = {path: {"shape": spec.shape} for path, spec in native.model_specs(config).items()}
        check_templates(wanted, there, where=directory)
        return wanted

    with open_foreign(directory) as foreign:
        return load_params(foreign, checked)
