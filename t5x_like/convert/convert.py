"""One conversion from path to path: what the source is, into which form it goes, and nothing half-written.

The result is staged beside its place and renamed when it is whole.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from t5x_like.convert import compressed_tensors, huggingface, native, tokenizers
from t5x_like.convert.compressed_tensors import PackedTensors, Packing
from t5x_like.convert.families import FAMILIES
from t5x_like.convert.foreign import Foreign, open_foreign
from t5x_like.convert.mapping import FLOATS, ModelMap, Reading
from t5x_like.convert.transfer import Change, between_native, from_native, in_threads
from t5x_like.core import tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.models import config as model_config
from t5x_like.models.config import ModelConfig
from t5x_like.storage import model_directory, paths, patterns, streams
from t5x_like.storage.base import readers
from t5x_like.storage.leaves import Built
from t5x_like.storage.model_directory import ModelDirectory


def to_native(source: str, target: str, *, dtype: str | None = None) -> ModelConfig:
    """Converts a model of another program into a model directory. dtype None: as stored. Returns the model's config."""
    _check_dtype(dtype)
    with open_foreign(patterns.one(source)) as foreign, staged(target) as staging:
        foreign.check()
        config, mapping, reading = open_reading(foreign, dtype=dtype)
        itemsize = np.dtype(config.dtype.params).itemsize
        streams.require_space(staging, itemsize * sum(math.prod(leaf.shape) for leaf in mapping.leaves.values()))
        native.write(
            staging,
            config,
            reading,
            mapping,
            dtype=dtype,
            tokenizer=foreign.tokenizer,
            provenance={"source": foreign.path, "form": foreign.form},
            extra=foreign.extra,
        )
    return config


def open_reading(foreign: Foreign, *, dtype: str | None) -> tuple[ModelConfig, ModelMap, Reading]:
    """The config of a foreign model, and its leaves ready to be read. Reads no tensor but those that may be copies."""
    config = native.model_config(foreign.family, foreign.fields, dtype="float32", where=foreign.path)
    mapping = native.model_map(foreign.table, config)
    reading = Reading(mapping, foreign.tensors)
    stored = dtype or reading.dtypes["embed/tokens"].name
    return native.model_config(foreign.family, foreign.fields, dtype=stored, where=foreign.path), mapping, reading


def load_params(
    foreign: Foreign,
    templates: Callable[[ModelConfig], Mapping[str, jax.ShapeDtypeStruct | Built]],
    *,
    packed: Callable[[str, np.ndarray, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """The parameters of a model of another program. templates(config): the type and place of each leaf, by path, or
    what makes the leaf of the pieces that are read. packed(path, values, scale): a leaf that is stored in int8; None:
    such leaves are read as floats.

    A device's share of a leaf is read when it is placed; the host holds one share at a time. A leaf without a sharding
    goes to the first device.
    """
    foreign.check()
    config, mapping, reading = open_reading(foreign, dtype=None)
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = {}
    for path, wanted in templates(config).items():
        tensors = foreign.tensors
        if (
            packed is not None
            and isinstance(tensors, PackedTensors)
            and all(map(tensors.is_packed, reading.names(path)))
        ):
            arrays[path] = packed(path, *_read_packed(tensors, mapping, reading, path))
            continue
        if isinstance(wanted, Built):
            arrays[path] = wanted.build(functools.partial(reading.read, path), mapping.chunk(path, 4))
            continue
        read = functools.partial(_read_share, mapping, reading, path, np.dtype(wanted.dtype).name)
        arrays[path] = jax.block_until_ready(jax.make_array_from_callback(wanted.shape, wanted.sharding or first, read))
    return tree.unflatten(arrays)


def _read_packed(
    tensors: PackedTensors, mapping: ModelMap, reading: Reading, path: str
) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scales with size 1 in the dims that are summed) of a leaf that is stored so."""
    shape, summed = mapping.leaves[path].shape, mapping.summed(path)
    scale_shape = [1 if dim in summed else size for dim, size in enumerate(shape)]
    values, scale = np.empty(shape, np.int8), np.empty(scale_shape, np.float32)
    for region in streams.chunks(shape, mapping.chunk(path, 1)):
        values[tuple(slice(*span) for span in region)] = reading.gather(path, region, np.int8, tensors.values)
    for region in streams.chunks(scale_shape, mapping.chunk(path, 4)):
        scale[tuple(slice(*span) for span in region)] = reading.gather(path, region, np.float32, tensors.scales)
    return values, scale


def _read_share(mapping: ModelMap, reading: Reading, path: str, dtype: str, index: Any) -> np.ndarray:
    """A region of a leaf, read a piece at a time so that no more than the region itself is held in full."""
    shape = mapping.leaves[path].shape
    region = tuple(slice_.indices(size)[:2] for slice_, size in zip(index, shape, strict=True))
    result = np.empty([end - begin for begin, end in region], dtype)

    def fill(part: streams.Region) -> None:
        shifted = tuple((begin + low, end + low) for (begin, end), (low, _) in zip(part, region, strict=True))
        result[tuple(slice(*span) for span in part)] = reading.read(path, shifted)

    pieces = streams.chunks(result.shape, mapping.chunk(path, result.itemsize))
    for _ in in_threads(fill, pieces):
        pass
    return result


def to_huggingface(
    source: str,
    target: str,
    *,
    dtype: str | None = None,
    step: int | None = None,
    item: str = native.PARAMS,
    shard_bytes: int = huggingface.SHARD_BYTES,
    change: Change | None = None,
    pack: Callable[[ModelMap, np.dtype], Packing] | None = None,
    finish: Callable[[str, model_directory.ModelDirectory, dict[str, Any]], None] | None = None,
) -> ModelConfig:
    """Converts a model directory into a Hugging Face folder. dtype None: as stored. Returns the model's config.

    change: what becomes of the weights, piece by piece; arrays that are none of the model's are left out then.
    pack(mapping, float type): which leaves are written in int8, and how; None for none. finish(folder, source, its
    metadata): puts more files into the folder before it takes its name.
    """
    _check_dtype(dtype)
    place = model_directory.locate(patterns.one(source), step=step)
    note = model_directory.read_metadata(place.checkpoint)
    config = model_config.resolve(note["config"]["model"])
    if config.family not in FAMILIES:
        raise UserError(f"{source} is a model of the family {config.family}, which Hugging Face does not have")
    family = FAMILIES[config.family]
    mapping = native.model_map(family.table, config)
    if note["kinds"].get(item):
        kind = next(iter(note["kinds"][item].values()))["kind"]
        raise UserError(f"{place.checkpoint} holds {kind} weights; convert the model that they were made from")
    leaves, recorded = readers(place.checkpoint, item)
    leaves = leaves if change is None else {path: leaf for path, leaf in leaves.items() if path in mapping.leaves}
    _check_leaves(leaves, mapping.leaves, where=place.checkpoint)
    dtypes = {path: np.dtype(dtype) if dtype else leaf.dtype for path, leaf in leaves.items()}
    token_ids = tokenizers.token_ids(place.tokenizer, note)
    settings = huggingface.settings(
        family, config, dtype=dtypes["embed/tokens"].name, token_ids=token_ids, name=config.family
    )
    packing = None if pack is None else pack(mapping, dtypes["embed/tokens"])
    if packing is None:
        described = {name: (shape, dtypes[path]) for name, (shape, path) in mapping.written().items()}
    else:
        described = packing.described(mapping.written(), dtypes)
        settings["quantization_config"] = compressed_tensors.settings()
    with staged(target) as staging:
        streams.require_space(staging, sum(math.prod(s) * d.itemsize for s, d in described.values()))
        tokenizers.write(place.tokenizer, staging, name=config.family)
        paths.write_json_atomic(os.path.join(staging, huggingface.CONFIG), settings)
        generation = note.get("generation_config") or tokenizers.generation(place.tokenizer, token_ids)
        paths.write_json_atomic(os.path.join(staging, huggingface.GENERATION), generation)
        writer = huggingface.FolderWriter(staging, described, shard_bytes=shard_bytes)
        try:
            where = place.checkpoint
            from_native(
                leaves,
                mapping,
                writer,
                dtype=dtype,
                recorded=recorded,
                where=where,
                packing=packing,
                change=change,
            )
        finally:
            writer.close()
        if finish is not None:
            finish(staging, place, note)
    return config


@dataclasses.dataclass(frozen=True)
class Inherited:
    provenance: dict[str, Any]
    extra: dict[str, Any]


def changed(
    source: str,
    target: str,
    *,
    change: Change,
    dtype: str | None = None,
    step: int | None = None,
    item: str = native.PARAMS,
    provenance: Mapping[str, Any],
) -> ModelConfig:
    """A model directory of the model in another, its weights changed piece by piece. Returns the model's config."""
    _check_dtype(dtype)
    place = model_directory.locate(patterns.one(source), step=step)
    note = model_directory.read_metadata(place.checkpoint)
    config = model_config.resolve(note["config"]["model"])
    specs = native.model_specs(config)
    leaves, recorded = readers(place.checkpoint, item)
    leaves = {path: leaf for path, leaf in leaves.items() if path in specs}
    _check_leaves(leaves, specs, where=place.checkpoint)
    types = {path: np.dtype(dtype) if dtype else leaf.dtype for path, leaf in leaves.items()}
    config = dataclasses.replace(config, dtype=dataclasses.replace(config.dtype, params=types["embed/tokens"].name))
    with staged(target) as staging:
        streams.require_space(
            staging, sum(math.prod(leaf.shape) * types[path].itemsize for path, leaf in leaves.items())
        )
        checkpoint = os.path.join(staging, model_directory.CHECKPOINTS, "0")
        moved = between_native(
            leaves,
            os.path.join(checkpoint, native.PARAMS),
            dtype=dtype,
            recorded=recorded,
            where=place.checkpoint,
            change=change,
        )
        inherited = inherit(place, note, staging)
        native.complete(
            checkpoint, config, moved, provenance=dict(inherited.provenance) | dict(provenance), extra=inherited.extra
        )
    return config


def inherit(place: ModelDirectory, note: Mapping[str, Any], staging: str) -> Inherited:
    """What a model directory that is made of another one takes from it. Copies its tokenizer."""
    if paths.exists(place.tokenizer):
        with paths.local_copy(place.tokenizer) as folder:
            shutil.copytree(folder, os.path.join(staging, model_directory.TOKENIZER))
    known = note.get("provenance", {})
    kept = {name: known[name] for name in ("tokenizer",) if name in known}
    extra = {"token_ids": tokenizers.token_ids(place.tokenizer, note)}
    extra |= {name: note[name] for name in ("generation_config",) if name in note}
    return Inherited(kept, extra)


@contextlib.contextmanager
def staged(target: str) -> Iterator[str]:
    """A folder beside `target` that takes its name if the body ends well, and vanishes if not."""
    if paths.is_remote(target):
        raise UsageError(f"{target}: a conversion writes to a local disk; copy the result to its bucket afterwards")
    final = paths.normal(target)
    if os.path.lexists(final) and not (os.path.isdir(final) and not os.listdir(final)):
        raise UsageError(f"{target} exists; give the name of a new folder")
    folder = f"{final}.tmp.{os.getpid()}"
    paths.make_directory(folder)
    try:
        yield folder
        if os.path.isdir(final):
            os.rmdir(final)
        paths.rename(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"--dtype={dtype!r} is unknown; use one of {', '.join(FLOATS)}")


def _check_leaves(leaves: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> None:
    """wanted: by path, with the shape of each."""
    missing = sorted(wanted.keys() - leaves.keys())
    more = sorted(leaves.keys() - wanted.keys())
    if missing or more:
        what = f"{missing[0]!r} is missing" if missing else f"{more[0]!r} is unknown to its family"
        raise UserError(f"{where}: {what}; the parameters are not those of its config")
    for path, leaf in leaves.items():
        if leaf.shape != wanted[path].shape:
            raise UserError(f"{where}: {path!r} has the shape {list(leaf.shape)}, expected {list(wanted[path].shape)}")
        if leaf.dtype.name not in FLOATS:
            raise UserError(f"{where}: {path!r} is stored as {leaf.dtype.name}; expected {', '.join(FLOATS)}")
