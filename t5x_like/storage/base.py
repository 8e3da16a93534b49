"""Checkpoints that hold the trained part of a model alone, and the base that they name: another checkpoint, by its
directory and by one fingerprint of all its leaves that are needed.

A base may itself hold a part and name its own base. Nothing of a base is ever written again.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import paths
from t5x_like.storage.leaves import Constructor, array_paths
from t5x_like.storage.model_directory import CHECKPOINTS, METADATA, locate, read_metadata
from t5x_like.storage.reading import Place, restore
from t5x_like.storage.streams import LeafReader, read_item

_ITEM = "params"  # of a base: its average, if it has one, is not what training began with
_MODELS = ("params", "ema")  # items that may lack what a base has


def record(checkpoint: str, wanted: Iterable[str], *, beside: str = "") -> dict[str, str]:
    """What a checkpoint says of its base: where it lies, the fingerprint of its leaves `wanted`, by path, and the way
    there from `beside`, a checkpoint of the run that says so: both may be moved together."""
    found = {"directory": paths.normal(checkpoint), "fingerprint": fingerprint(checkpoint, wanted)}
    way = paths.way(beside, checkpoint) if beside else ""
    return found | ({"way": way} if way else {})


def fingerprint(checkpoint: str, wanted: Iterable[str]) -> str:
    """One number for many leaves, of what was recorded of each when it was saved; reading verifies them one by one."""
    known = _leaves(checkpoint, _ITEM)
    missing = sorted(path for path in wanted if not _below(known, path))
    if missing:
        raise UserError(f"{checkpoint} has no {missing[0]!r}; it is no base of this model")
    chosen = {name: known[name] for path in wanted for name in _below(known, path)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def located(
    base: Mapping[str, str],
    wanted: Iterable[str] | None,
    *,
    where: str,
    among: Sequence[str] = (),
    own: Collection[str] = (),
) -> str:
    """The directory of the base that the checkpoint `where` names, with the leaves that it was trained on.

    It is looked for in `among` (workdirs, model directories or checkpoints), on the way from `where`, and where it lay
    when the run began. wanted, own: as of `holds`. Raises UserError if it is at none of these places, or holds other
    parameters by now.
    """
    wanted = None if wanted is None else [*wanted]
    there = [place for place in _places(base, where, among) if _is_checkpoint(place)]
    found = next((place for place in there if holds(base, wanted, place, own=own)), None)
    if found is not None:
        return found
    raise _changed(where, there[-1]) if there else _gone(base, where)


def holds(base: Mapping[str, str], wanted: Iterable[str] | None, checkpoint: str, *, own: Collection[str] = ()) -> bool:
    """Whether a checkpoint is the base that was named so, wherever it lies.

    wanted: its leaves that training needed, or a part of them, None where they are not known; own: the leaves that the
    trained part has itself, so that all others are a base's.
    """
    try:
        if wanted is not None and fingerprint(checkpoint, wanted) == base["fingerprint"]:
            return True
        return fingerprint(checkpoint, _leaves(checkpoint, _ITEM).keys() - set(own)) == base["fingerprint"]
    except UserError:
        return False


def checkpoints_in(directory: str, base: Mapping[str, str]) -> list[str]:
    """The checkpoints in a workdir or model directory that may be this base: of its step, or the newest; or itself."""
    if _is_checkpoint(directory):
        return [directory]
    same = paths.join(directory, CHECKPOINTS, paths.base_name(base["directory"]))
    try:
        newest = [locate(directory).checkpoint]
    except UserError:
        newest = []
    return [*dict.fromkeys([*([same] if _is_checkpoint(same) else []), *newest])]


def _places(base: Mapping[str, str], where: str, among: Sequence[str]) -> list[str]:
    given = [place for directory in among for place in checkpoints_in(directory, base)]
    moved = [paths.along(where, base["way"])] if "way" in base else []
    return [*dict.fromkeys([*given, *moved, base["directory"]])]


def _is_checkpoint(directory: str) -> bool:
    return paths.exists(paths.join(directory, METADATA, METADATA))


def _gone(base: Mapping[str, str], where: str) -> UserError:
    return UserError(
        f"{where} holds the trained part alone and needs its base {base['directory']}, which is not there; "
        "move it back, or say where it lies: t5x_like.load(..., base=DIR), or init_from=DIR of a resume"
    )


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
    among: Sequence[str] = (),
) -> dict[str, Any]:
    """The tree `templates` (nested dicts) of an item; what a checkpoint of a trained part lacks comes from its base,
    which `located` finds."""
    note = read_metadata(checkpoint)
    base, recorded = note.get("base"), note["arrays"].get(item, {})
    if base is None:
        return restore(checkpoint, {item: templates}, kinds=kinds, place=place)[item]
    here, there = tree.split(templates, lambda path: bool(_below(recorded, path)))
    trained = restore(checkpoint, {item: here}, kinds=kinds, place=place)[item] if here else {}
    if not there:
        return trained
    directory = located(base, array_paths(there), where=checkpoint, among=among, own=recorded)
    return tree.join(trained, restore_whole(directory, _ITEM, there, kinds=kinds, place=place))


def restore_items(checkpoint: str, templates: Mapping[str, Any], *, among: Sequence[str] = ()) -> dict[str, Any]:
    """The items `templates`, as `reading.restore` gives them, those of models whole."""
    if "base" not in read_metadata(checkpoint):
        return restore(checkpoint, templates)
    models = {name: template for name, template in templates.items() if name in _MODELS}
    others = {name: template for name, template in templates.items() if name not in _MODELS}
    return restore(checkpoint, others) | {
        name: restore_whole(checkpoint, name, template, among=among) for name, template in models.items()
    }


def readers(checkpoint: str, item: str) -> tuple[dict[str, LeafReader], dict[str, int]]:
    """The leaves of an item ready to be read in pieces, and the fingerprint of each; those that a checkpoint of a
    trained part lacks are its base's, which must be the one that it names."""
    note = read_metadata(checkpoint)
    leaves, recorded = read_item(checkpoint, item), dict(note["fingerprints"][item])
    if "base" not in note:
        return leaves, recorded
    below, known = readers(located(note["base"], None, where=checkpoint, own=recorded), _ITEM)
    return below | leaves, known | recorded


def _leaves(checkpoint: str, item: str) -> dict[str, Any]:
    """path -> what was recorded of an array, through all bases."""
    note = read_metadata(checkpoint)
    inherited: dict[str, Any] = {}
    if "base" in note:
        there = [place for place in _places(note["base"], checkpoint, ()) if _is_checkpoint(place)]
        if not there:
            raise _gone(note["base"], checkpoint)
        inherited = _leaves(there[0], _ITEM)
    arrays, numbers = note["arrays"].get(item, {}), note["fingerprints"].get(item, {})
    return inherited | {path: [arrays[path], numbers[path]] for path in arrays}


def _below(known: Mapping[str, Any], path: str) -> list[str]:
    """The arrays of a leaf: itself, or its parts where it was saved as another kind."""
    return [path] if path in known else [name for name in known if name.startswith(f"{path}/")]
