"""Where a model lies and what is known about it, without its arrays: no array library is imported here.

A model directory is a workdir (or a converted model, which has the same layout), or one checkpoint out of it, moved
or not, with the `tokenizer/` beside its items.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from t5x_like.core import formats
from t5x_like.core.errors import UserError
from t5x_like.storage import paths, patterns

CHECKPOINTS, TOKENIZER, METADATA = "checkpoints", "tokenizer", "metadata"
COMMITTED = "commit_success.txt"  # in a bucket, where nothing can be renamed, Orbax's sign that a checkpoint is whole


class DamagedCheckpoint(UserError):
    """The bytes of a checkpoint are not those that were saved."""


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """One checkpoint and the tokenizer that belongs to it, as paths; `steps` are all that lie beside it."""

    checkpoint: str
    tokenizer: str
    steps: tuple[int, ...]


def locate(directory: str, *, step: int | None = None) -> ModelDirectory:
    """The checkpoint of `step`, or the newest, in a model directory. Raises UserError if there is none."""
    root = paths.normal(directory)
    if paths.exists(paths.join(root, METADATA, METADATA)):
        if step is not None and str(step) != paths.base_name(root):
            raise UserError(f"{directory} is one checkpoint; leave the step out, or give the workdir it belongs to")
        beside = paths.join(root, TOKENIZER)
        if not paths.exists(beside) and paths.base_name(paths.parent(root)) == CHECKPOINTS:
            beside = paths.join(paths.parent(paths.parent(root)), TOKENIZER)
        return ModelDirectory(root, beside, ())
    checkpoints = paths.join(root, CHECKPOINTS)
    if not paths.is_directory(checkpoints):
        raise UserError(f"{directory} is no model directory: it has no {CHECKPOINTS}/; give the --workdir of a run")
    steps = committed_steps(checkpoints)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint yet; wait for the first one of the run")
    if step is not None and step not in steps:
        raise no_step(checkpoints, step, steps)
    chosen = steps[-1] if step is None else step
    return ModelDirectory(paths.join(checkpoints, str(chosen)), paths.join(root, TOKENIZER), tuple(steps))


def split(text: str) -> tuple[str, int | None]:
    """(full path, step or None) of `DIR[@STEP]`.

    >>> split("/runs/a@120"), split("/runs/a@b")
    (('/runs/a', 120), ('/runs/a@b', None))
    """
    directory, step = divided(text)
    return paths.normal(directory), step


def divided(text: str) -> tuple[str, int | None]:
    """As `split`, with the directory as it is written."""
    directory, _, step = text.rpartition("@")
    return (directory, int(step)) if directory and step.isascii() and step.isdigit() else (text, None)


def named(text: str, *, what: str) -> tuple[str, int | None]:
    """As `split`, of what somebody gives: DIR may be a pattern, and a folder DIR@STEP is itself unless there is a DIR.

    what: as in `patterns.one`. Raises UserError unless it means just one path.
    """
    directory, step = divided(text)
    if step is not None and not paths.exists(paths.normal(directory)) and paths.exists(paths.normal(text)):
        return paths.normal(text), None
    return paths.normal(patterns.one(directory, what=what)), step


def committed_steps(checkpoints: str) -> list[int]:
    """The steps whose checkpoints are whole, ascending, as they stand on the disk now."""
    found = [int(name) for name in paths.list_names(checkpoints) if name.isascii() and name.isdigit()]
    if paths.is_remote(checkpoints):
        found = [step for step in found if paths.exists(paths.join(checkpoints, str(step), COMMITTED))]
    return sorted(found)


def no_step(checkpoints: str, step: int, steps: list[int]) -> UserError:
    return UserError(f"{checkpoints} holds no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}")


def read_metadata(checkpoint: str) -> dict[str, Any]:
    """The JSON object that was saved with a checkpoint, its config in the present format.

    Raises DamagedCheckpoint if it is not there or not sound, UserError if it is of a newer format.
    """
    where = paths.join(checkpoint, METADATA, METADATA)
    if not paths.exists(where):
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: it has no metadata")
    try:
        content = json.loads(paths.read_bytes(where))
        sound = digest(content) == content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: its metadata is not what was saved")
    formats.version(content, where=checkpoint)
    config = {"format": content.get("format", 1), **content.get("config", {})}
    return {**content, "config": formats.upgrade(config, where=f"the config of {checkpoint}")}


def note(
    *,
    step: int,
    arrays: Mapping[str, Mapping[str, Mapping[str, Any]]],
    kinds: Mapping[str, Any],
    fingerprints: Mapping[str, Mapping[str, int]],
    metrics: Mapping[str, float],
    metadata: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON object of a checkpoint: `metadata` of whoever saves it, and what is known of its arrays.

    arrays: item -> path -> {shape, dtype}; kinds: item -> path -> record of a leaf that is no plain array;
    fingerprints: item -> path -> number.
    """
    content = {
        **metadata,
        "format": formats.FORMAT,
        "step": step,
        "time": round(time.time(), 3),
        "arrays": arrays,
        "kinds": kinds,
        "fingerprints": fingerprints,
        "metrics": metrics,
    }
    # Through JSON once, so that what is hashed is what will be read.
    content = json.loads(json.dumps(content, allow_nan=False))
    return {**content, "sha256": digest(content)}


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of what is saved as metadata, but for the sum itself."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
