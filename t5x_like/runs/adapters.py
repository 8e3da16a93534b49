"""Adapters in checkpoints: read with their base or onto a loaded one, merged, exchanged with the peft package."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from t5x_like.convert import native, peft_format
from t5x_like.convert.convert import inherit, staged
from t5x_like.convert.peft_format import Factors, PeftAdapter
from t5x_like.convert.transfer import write_item
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Leaf, Tree
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.peft import attach
from t5x_like.peft.merge import Merge
from t5x_like.storage import base as bases
from t5x_like.storage import model_directory, paths
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


def merge(checkpoint: str, item: str, *, sign: int = 1) -> Merge:
    """What writes the adapter of a checkpoint into weights as they are converted, or with the sign -1 takes it out."""
    note = model_directory.read_metadata(checkpoint)
    model = native.model_specs(model_config.resolve(note["config"]["model"]))
    adapter = attach.of_stored(note["config"], tree.unflatten(model))
    if adapter is None:
        raise UsageError(f"{checkpoint} holds no adapter; give the directory of a run with config.adapter.name='lora'")
    return Merge(adapter, arrays(checkpoint, item), sign=sign)


def check_merged(source: str, *, step: int | None, item: str, adapter: str, taking_out: Merge) -> str:
    """UserError unless the adapter of the checkpoint `adapter` may be taken out of the model `source`: its weights have
    these shapes, and one of them is without the adapter what the adapter's base has. A line that says so if that is not
    there, else nothing."""
    checkpoint = model_directory.locate(source, step=step).checkpoint
    leaves, _ = bases.readers(checkpoint, item)
    for path, shape in taking_out.shapes.items():
        found = leaves[path].shape if path in leaves else None
        if found != shape:
            has = "no such weight" if found is None else f"one of {list(found)}"
            raise UserError(
                f"{adapter} is for a model with {path!r} of the shape {list(shape)}, and {source} has {has}; give the "
                "model that it was merged into"
            )
    base = model_directory.read_metadata(adapter).get("base", {}).get("directory", "")
    if not paths.exists(paths.join(base, model_directory.METADATA, model_directory.METADATA)):
        return f"the base of {adapter} is not there ({base or 'unknown'}): what is left is not compared with it"
    path = min(taking_out.shapes, key=lambda name: math.prod(taking_out.shapes[name]))
    region = tuple((0, size) for size in taking_out.shapes[path])
    stored = leaves[path].read(region)
    left = taking_out(path, region, stored, np.dtype(np.float32))
    wanted = bases.readers(base, native.PARAMS)[0][path].read(region).astype(np.float32)
    info = ml_dtypes.finfo(stored.dtype)
    room = 2 * float(info.eps) * float(np.abs(stored.astype(np.float32)).max() + np.abs(wanted).max())
    if np.abs(left - wanted).max() > room:
        raise UserError(
            f"without {adapter} the weight {path!r} of {source} is not that of the base {base}: the adapter was never "
            "merged into it, or into another model; give the model that it was merged into"
        )
    return ""


def arrays(checkpoint: str, item: str) -> dict[str, np.ndarray]:
    """The arrays of an adapter by path below its root, on the host."""
    note = model_directory.read_metadata(checkpoint)
    wanted = {path: record for path, record in note["arrays"][item].items() if attach.is_adapter(path)}
    templates = {path: jax.ShapeDtypeStruct(tuple(record["shape"]), "float32") for path, record in wanted.items()}
    found = restore(checkpoint, {item: tree.unflatten(templates)})[item]
    return {path: np.asarray(leaf) for path, leaf in tree.leaves(found[attach.ROOT])}


def to_peft(source: str, target: str, *, step: int | None, item: str) -> None:
    """Writes the adapter of a run as peft saves one; the path of our base stands in `base_model_name_or_path`."""
    checkpoint = model_directory.locate(source, step=step).checkpoint
    trained = model_directory.read_metadata(checkpoint)["arrays"][item]
    beside = next((path for path in trained if not attach.is_adapter(path)), None) if _of_part(checkpoint) else None
    if beside is not None:
        raise UserError(
            f"{checkpoint} trained {beside!r} beside its adapter, which an adapter of peft's would lack; convert it "
            "without --to=peft, merged into its base"
        )
    write_peft(target, checkpoint, arrays(checkpoint, item))


def _of_part(checkpoint: str) -> bool:
    """Whether a checkpoint holds the trained part alone."""
    return "base" in model_directory.read_metadata(checkpoint)


def write_peft(target: str, source: str, parts: Mapping[str, np.ndarray]) -> None:
    """As `to_peft`, of arrays in hand that are shaped as those of the adapter in `source`, such as its gradients."""
    note = model_directory.read_metadata(model_directory.locate(source).checkpoint)
    config = model_config.resolve(note["config"]["model"])
    adapter = attach.of_stored(note["config"], tree.unflatten(native.model_specs(config)))
    if adapter is None:
        raise UsageError(f"{source} holds no adapter; leave --to=peft out")
    lora = note["config"]["adapter"]["lora"]
    factors = {
        path: Factors(_stacked(target, parts[f"{path}/a"]), _stacked(target, parts[f"{path}/b"]), target.ranks)
        for path, target in adapter.targets.items()
    }
    saved = PeftAdapter(
        factors,
        rank=lora["rank"],
        alpha=lora["alpha"],
        rank_stabilized=lora["rank_stabilized"],
        dropout=lora["dropout"],
        base=note.get("base", {}).get("directory", ""),
    )
    with staged(target) as staging:
        peft_format.write(staging, config, saved)


def from_peft(source: str, target: str, *, base: str) -> None:
    """Makes a model directory of an adapter that peft saved, on `base`, one of ours."""
    place = model_directory.locate(base)
    note = model_directory.read_metadata(place.checkpoint)
    if attach.has_adapter(note["config"]):
        raise UsageError(f"--base={base} is an adapter itself; give the model below it")
    config = model_config.resolve(note["config"]["model"])
    specs = native.model_specs(config)
    found = peft_format.read(source, config)
    section = {
        "name": "lora",
        "lora": {
            "rank": found.rank,
            "alpha": found.alpha,
            "rank_stabilized": found.rank_stabilized,
            "dropout": found.dropout,
            "targets": [re.escape(path) for path in found.factors],
            "ranks": [[re.escape(path), list(factors.ranks)] for path, factors in found.factors.items()],
        },
    }
    adapter = attach.of_stored({"adapter": section}, tree.unflatten(specs))
    assert adapter is not None
    new = tree.flatten(adapter.specs())
    parts = {f"{attach.ROOT}/{path}/{name}": getattr(f, name) for path, f in found.factors.items() for name in "ab"}
    with staged(target) as staging:
        inherited = inherit(place, note, staging)
        checkpoint = paths.join(staging, model_directory.CHECKPOINTS, "0")
        moved = write_item(
            paths.join(checkpoint, native.PARAMS), {path: parts[path].reshape(spec.shape) for path, spec in new.items()}
        )
        native.complete(
            checkpoint,
            config,
            moved,
            provenance=inherited.provenance | {"source": paths.normal(source), "form": "peft"},
            extra=inherited.extra | {"base": bases.record(place.checkpoint, specs)},
            axes={path: list(spec.axes) for path, spec in new.items()},
            sections={"adapter": section},
        )


def _stacked(target: attach.Target, part: np.ndarray) -> np.ndarray:
    return part if target.spec.axes[:1] == ("layers",) else part[None]
