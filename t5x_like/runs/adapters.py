"""Adapters that checkpoints hold, put onto the weights of their base: read with it, or onto a model that is loaded."""

from collections.abc import Callable, Mapping
from typing import Any

from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Leaf, Tree
from t5x_like.models.model import Model
from t5x_like.peft import attach
from t5x_like.storage import base as bases
from t5x_like.storage import model_directory
from t5x_like.storage.leaves import Constructor
from t5x_like.storage.reading import Place, restore


def restore_attached(
    checkpoint: str,
    item: str,
    model: Model,
    templates: Tree,
    put: Callable[[Tree], Tree],
    *,
    kinds: Mapping[str, Constructor],
    place: Place,
) -> dict[str, Any]:
    """The parameters of a checkpoint as `model.apply` takes them: those of an adapter with their base, joined.

    templates: of the model's own parameters. put(specs): the templates of an adapter's. kinds, place: as in
    `reading.restore`.
    """
    adapter = attach.of_stored(model_directory.read_metadata(checkpoint)["config"], model.specs())
    if adapter is None:
        return bases.restore_whole(checkpoint, item, templates, kinds=kinds, place=place)
    whole = tree.join(templates, put(adapter.specs()))
    return adapter.attach(bases.restore_whole(checkpoint, item, whole, kinds=kinds, place=place))


def restore_onto(
    loaded: Tree, model: Model, loaded_from: str | None, checkpoint: str, item: str, place: Callable[[Tree], Tree]
) -> dict[str, Any]:
    """The parameters `loaded` of a base with the adapter of a checkpoint on them; the base's arrays are shared.

    loaded_from: the checkpoint that they were read from. Raises UserError unless the adapter was trained on that one.
    """
    note = model_directory.read_metadata(checkpoint)
    if not attach.has_adapter(note["config"]) or "base" not in note:
        raise UsageError(f"load: {checkpoint} is no adapter that names its base; load it without base")
    if any(isinstance(leaf, Leaf) for _, leaf in tree.leaves(loaded)):
        raise UsageError("load: base has an adapter itself, or int8 weights; give the plain model below it")
    adapter = attach.of_stored(note["config"], model.specs())
    assert adapter is not None
    known = None if loaded_from is None else bases.fingerprint(loaded_from, tree.flatten(model.specs()))
    if known != note["base"]["fingerprint"]:
        raise UserError(
            f"{checkpoint} is an adapter of {note['base']['directory']}, and base is {loaded_from or 'another model'}, "
            "whose parameters are others; load the former as base"
        )
    parts = restore(checkpoint, {item: place(adapter.specs())})[item]
    return adapter.attach(tree.join(loaded, parts))
