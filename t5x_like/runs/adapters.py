"""Adapters in checkpoints: read with their base or onto a loaded one, merged, exchanged with the peft package."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5x_like.convert import native, peft_format
from t5x_like.convert.convert import inherit, staged
from t5x_like.convert.peft_format import Factors, PeftAdapter
from t5x_like.convert.stored import StoredModel, open_model
from t5x_like.convert.transfer import write_item
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Tree
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.peft import attach
from t5x_like.peft.lora import LoraArray
from t5x_like.peft.merge import Merge
from t5x_like.storage import base as bases
from t5x_like.storage import model_directory, paths
from t5x_like.storage.leaves import Constructor
from t5x_like.storage.reading import Place, restore
from t5x_like.storage.streams import Region, chunks


def restore_attached(
    checkpoint: str,
    item: str,
    model: Model,
    templates: Tree,
    put: Callable[[Tree], Tree],
    *,
    kinds: Mapping[str, Constructor],
    place: Place,
    base: str | None = None,
) -> dict[str, Any]:
    """The parameters of a checkpoint as `model.apply` takes them: those of an adapter with their base, joined.

    templates: of the model's own parameters. put(specs): the templates of an adapter's. kinds, place: as in
    `reading.restore`. base: the directory where that of an adapter lies now. Raises UserError where it is another.
    """
    note = model_directory.read_metadata(checkpoint)
    among = () if base is None else (_of_base(note, base, checkpoint, tree.flatten(templates)),)
    adapter = attach.of_stored(note["config"], model.specs())
    whole = templates if adapter is None else tree.join(templates, put(adapter.specs()))
    found = bases.restore_whole(checkpoint, item, whole, kinds=kinds, place=place, among=among)
    return found if adapter is None else adapter.attach(found)


def _of_base(note: Mapping[str, Any], given: str, checkpoint: str, templates: Mapping[str, Any]) -> str:
    """The checkpoint in the directory `given` that is the base of this one."""
    if "base" not in note:
        raise UsageError(f"load: {checkpoint} holds the whole model and names no base; load it without base")
    wanted = [path for path in templates if path not in note["arrays"][native.PARAMS]]
    for found in bases.checkpoints_in(paths.normal(given), note["base"]):
        if bases.holds(note["base"], wanted, found):
            return found
    raise UserError(
        f"{checkpoint} is an adapter of {note['base']['directory']}, and no checkpoint in {given} has its parameters; "
        "give the former as base"
    )


def restore_onto(
    loaded: Tree, model: Model, loaded_from: str | None, checkpoint: str, item: str, place: Callable[[Tree], Tree]
) -> dict[str, Any]:
    """The parameters `loaded` of a base with the adapter of a checkpoint on them; the base's arrays are shared.

    loaded_from: the checkpoint that they were read from. Raises UserError unless the adapter was trained on that one.
    """
    note = model_directory.read_metadata(checkpoint)
    if not attach.has_adapter(note["config"]) or "base" not in note:
        raise UsageError(f"load: {checkpoint} is no adapter that names its base; load it without base")
    if any(isinstance(leaf, LoraArray) for _, leaf in tree.leaves(loaded)):
        raise UsageError("load: base has an adapter itself; give the plain model below it")
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


def open_merged(directory: str) -> StoredModel:
    """As `open_model`, for who wants a whole model: the weights of an adapter's base are read with the adapter added to
    them, rounded as `convert` rounds a merged model."""
    found = open_model(directory, adapters=True)
    if found.step is None or not attach.has_adapter(model_directory.read_metadata(found.directory)["config"]):
        return found
    return dataclasses.replace(found, read=functools.partial(_read_merged, found.directory))


def _read_merged(checkpoint: str, templates: Tree) -> dict[str, Any]:
    adding = merge(checkpoint, native.PARAMS)

    def template(path: str, plain: jax.ShapeDtypeStruct) -> Any:
        return _Merged(path, plain, adding) if path in adding.paths else plain

    return bases.restore_whole(checkpoint, native.PARAMS, tree.map_with_path(template, templates))


@dataclasses.dataclass(frozen=True)
class _Merged:
    """The template of a weight of a base that an adapter is added to while it is read (storage.leaves.Built). plain:
    of the sum."""

    path: str
    plain: jax.ShapeDtypeStruct
    adding: Merge

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plain.shape

    def build(self, read: Callable[[Region], np.ndarray], chunk: Sequence[int], /) -> jax.Array:
        whole = np.empty(self.shape, self.plain.dtype)
        for region in chunks(self.shape, chunk):
            piece = read(region)
            whole[tuple(slice(*span) for span in region)] = self.adding(self.path, region, piece, piece.dtype)
        sharding = self.plain.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.make_array_from_callback(self.shape, sharding, whole.__getitem__)


def merge(checkpoint: str, item: str, *, sign: int = 1) -> Merge:
    """What writes the adapter of a checkpoint into weights as they are converted, or with the sign -1 takes it out."""
    note = model_directory.read_metadata(checkpoint)
    model = native.model_specs(model_config.resolve(note["config"]["model"]))
    adapter = attach.of_stored(note["config"], tree.unflatten(model))
    if adapter is None:
        raise UsageError(f"{checkpoint} holds no adapter; give the directory of a run with config.adapter.name='lora'")
    return Merge(adapter, arrays(checkpoint, item), sign=sign)


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
    write_peft(target, checkpoint, arrays(checkpoint, item))


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
    _check_copies(found.copies, place.checkpoint, specs, where=source)
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


def _check_copies(copies: Mapping[str, np.ndarray], base: str, specs: Mapping[str, Any], *, where: str) -> None:
    """What peft has saved of the base beside an adapter of its embedding must be the base's."""
    for path, theirs in copies.items():
        template = jax.ShapeDtypeStruct(specs[path].shape, "float32")
        ours = tree.flatten(bases.restore_whole(base, native.PARAMS, tree.unflatten({path: template})))[path]
        if not np.array_equal(np.asarray(ours)[: len(theirs)], theirs):
            raise UserError(
                f"{where}: it holds another {path!r} than the model of --base: not an adapter alone was trained; give "
                "the model that it belongs to"
            )


def _stacked(target: attach.Target, part: np.ndarray) -> np.ndarray:
    return part if target.spec.axes[:1] == ("layers",) else part[None]
