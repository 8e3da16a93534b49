"""Checkpoints that hold the trained part of a model alone, and the base that they name: another checkpoint, by its
directory and by one fingerprint of all its leaves that are needed.

A base may itself hold a part and name its own base. Nothing of a base is ever written again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import paths
from t5x_like.storage.leaves import Constructor, array_paths
from t5x_like.storage.model_directory import METADATA, read_metadata
from t5x_like.storage.reading import Place, restore
from t5x_like.storage.streams import LeafReader, read_item

_ITEM = "params"  # of a base: its average, if it has one, is not what training began with
_MODELS = ("params", "ema")  # items that may lack what a base has


def record(checkpoint: str, wanted: Iterable[str]) -> dict[str, str]:
    """What a checkpoint says of its base: where it lies, and the fingerprint of its leaves `wanted`, by path."""
    return {"directory": paths.normal(checkpoint), "fingerprint": fingerprint(checkpoint, wanted)}


def fingerprint(checkpoint: str, wanted: Iterable[str]) -> str:
    """One number for many leaves, of what was recorded of each when it was saved; reading verifies them one by one."""
    known = _leaves(checkpoint, _ITEM)
    missing = sorted(path for path in wanted if not _below(known, path))
    if missing:
        raise UserError(f"{checkpoint} has no {missing[0]!r}; it is no base of this model")
    chosen = {name: known[name] for path in wanted for name in _below(known, path)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def read(
    base: Mapping[str, str], templates: Any, *, where: str, kinds: Mapping[str, Constructor], place: Place | None
) -> dict[str, Any]:
    """The leaves `templates` of the base that the checkpoint `where` names, verified to be those it was trained on."""
    directory = located(base, where=where)
    if fingerprint(directory, array_paths(templates)) != base["fingerprint"]:
        raise _changed(where, directory)
    return restore_whole(directory, _ITEM, templates, kinds=kinds, place=place)


def located(base: Mapping[str, str], *, where: str) -> str:
    """The directory of a base. Raises UserError if it is gone."""
    directory = base["directory"]
    if not paths.exists(paths.join(directory, METADATA, METADATA)):
        raise UserError(
            f"{where} holds the trained part alone and needs its base {directory}, which is not there; "
            "move it back, or read a checkpoint that was saved with config.checkpoint.holds='model'"
        )
    return directory


def _changed(where: str, directory: str) -> UserError:
    return UserError(
        f"{where} was trained on other parameters than its base {directory} holds now; put the former ones back"
    )


def restore_whole(
    checkpoint: str,
    item: str,
    templates: Any,
    *,
    kinds: Mapping[str, Constructor] | None = None,
    place: Place | None = None,
) -> dict[str, Any]:
    """The tree `templates` (nested dicts) of an item; what a checkpoint of a trained part lacks comes from its base."""
    note = read_metadata(checkpoint)
    base, recorded = note.get("base"), note["arrays"].get(item, {})
    if base is None:
        return restore(checkpoint, {item: templates}, kinds=kinds, place=place)[item]
    here, there = tree.split(templates, lambda path: bool(_below(recorded, path)))
    trained = restore(checkpoint, {item: here}, kinds=kinds, place=place)[item]
    if not there:
        return trained
    return tree.join(trained, read(base, there, where=checkpoint, kinds=kinds or {}, place=place))


def restore_items(checkpoint: str, templates: Mapping[str, Any]) -> dict[str, Any]:
    """The items `templates`, as `reading.restore` gives them, those of models whole."""
    if "base" not in read_metadata(checkpoint):
        return restore(checkpoint, templates)
    models = {name: template for name, template in templates.items() if name in _MODELS}
    others = {name: template for name, template in templates.items() if name not in _MODELS}
    return restore(checkpoint, others) | {
        name: restore_whole(checkpoint, name, template) for name, template in models.items()
    }


def readers(checkpoint: str, item: str) -> tuple[dict[str, LeafReader], dict[str, int]]:
    """The leaves of an item ready to be read in pieces, and the fingerprint of each; those that a checkpoint of a
    trained part lacks are its base's, which must be the one that it names."""
    note = read_metadata(checkpoint)
    leaves, recorded = read_item(checkpoint, item), dict(note["fingerprints"][item])
    if "base" not in note:
        return leaves, recorded
    directory = located(note["base"], where=checkpoint)
    below, known = readers(directory, _ITEM)
    wanted = below.keys() - leaves.keys()
    if fingerprint(directory, wanted) != note["base"]["fingerprint"]:
        raise _changed(checkpoint, directory)
    return below | leaves, known | recorded


def _leaves(checkpoint: str, item: str) -> dict[str, Any]:
    """path -> what was recorded of an array, through all bases."""
    note = read_metadata(checkpoint)
    inherited = _leaves(note["base"]["directory"], _ITEM) if "base" in note else {}
    arrays, numbers = note["arrays"].get(item, {}), note["fingerprints"].get(item, {})
    return inherited | {path: [arrays[path], numbers[path]] for path in arrays}


def _below(known: Mapping[str, Any], path: str) -> list[str]:
    """The arrays of a leaf: itself, or its parts where it was saved as another kind."""
    return [path] if path in known else [name for name in known if name.startswith(f"{path}/")]
