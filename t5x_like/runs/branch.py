"""A run that branches from a checkpoint of another one: it goes on with its parameters, optimizer state and step.

`config.checkpoint.branch_from=DIR[@STEP]` is resolved to a full path and a step at the first start, and stored so: a
branch that was killed before its first own checkpoint begins at the same place, whatever the other run saved since.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from t5x_like.convert.foreign import is_foreign
from t5x_like.core.errors import UsageError, UserError
from t5x_like.storage import model_directory, paths, patterns
from t5x_like.storage.model_directory import split
from t5x_like.storage.workdir import differences

_PATH = "config.checkpoint.branch_from"

Run = TypeVar("Run")


def settled(given: str | None, stored: str | None) -> str | None:
    """What a run that is resumed branched from, which nothing changes. Raises UsageError if it is told otherwise."""
    if given is None:
        return stored
    if stored is not None and (given == stored or _may_be(given, *split(stored))):
        return stored
    began = "did not branch from another run" if stored is None else f"branched from {stored}"
    raise UsageError(f"{_PATH}={given!r}, but the run in this --workdir {began}; use a new one for another branch")


def _may_be(given: str, directory: str, step: int | None) -> bool:
    """Whether a text means this full path and step, which need not be there any more."""
    readings = {model_directory.divided(given), (given, None)}
    return any(wanted in (None, step) and patterns.may_be(text, directory) for text, wanted in readings)


def resolve(text: str) -> str:
    """`DIR@STEP` in full, or the full path of a folder that is one checkpoint. Raises UserError if there is none."""
    directory, step = model_directory.named(text, what=f"{_PATH}=")
    if is_foreign(directory):
        raise UserError(f"{_PATH}: {directory} holds no optimizer state; begin with it by config.checkpoint.init_from")
    found = model_directory.locate(directory, step=step)
    if found.steps:
        return f"{directory}@{paths.base_name(found.checkpoint)}"
    return directory if split(directory) == (directory, None) else f"{directory}/"  # the @ is one of its name


def replaced(run: Run, text: str | None) -> Run:
    """The experiment with this `branch_from`."""
    experiment: Any = run
    return dataclasses.replace(experiment, checkpoint=dataclasses.replace(experiment.checkpoint, branch_from=text))


def checkpoint(text: str) -> str:
    """The path of the checkpoint that a resolved text names."""
    directory, step = split(text)
    return model_directory.locate(directory, step=step).checkpoint


def changes(checkpoint: str, *, config: Mapping[str, Any], data: str, tokenizer: str) -> list[str]:
    """What a branch changes of the run that it comes from. Raises UserError for another tokenizer or optimizer.

    `config` is that of the branch as it is stored, `data` and `tokenizer` its fingerprints.
    """
    note = model_directory.read_metadata(checkpoint)
    before = note.get("provenance", {})
    if before.get("tokenizer", tokenizer) != tokenizer:
        raise UserError(
            f"{_PATH}: {checkpoint} was trained with another tokenizer ({before['tokenizer'][:12]}, here "
            f"{tokenizer[:12]}); set config.data.tokenizer to that of the run"
        )
    name = config["optim"]["name"]
    other = (note["config"].get("optim") or {}).get("name", name)
    if other != name:  # the state of one may look like part of another's
        raise UsageError(
            f"config.optim.name={name!r}, but {checkpoint}, which this run branches from, holds the state of "
            f"{other!r}; keep that, or begin with the parameters alone by config.checkpoint.init_from"
        )
    found = [
        str(change)
        for change in differences(note["config"], paths.as_json(config))
        if not change.within(("checkpoint.branch_from",))
    ]
    if before.get("data", data) != data:
        found.append(f"data: fingerprint {before['data'][:12]} -> {data[:12]}")
    return found
