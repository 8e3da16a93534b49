"""Reads a model directory, or a folder of Hugging Face, as a model with its parameters and vocabulary: onto a mesh, in
a type, an adapter with its base. What is done with it is language_model.py.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_like.compress import quant_array
from t5x_like.compress import reading as quantizing
from t5x_like.compress.quant_array import QuantArray
from t5x_like.convert.convert import load_params
from t5x_like.convert.foreign import is_foreign, open_foreign
from t5x_like.core import dtypes, tree
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import ParamSpec, Tree
from t5x_like.data.read import source_target
from t5x_like.data.templates.chat import named_text
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.inference.weights import in_dtype
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.parallel.sharding import named
from t5x_like.runs import adapters, roles
from t5x_like.storage import model_directory, paths, patterns
from t5x_like.storage.model_directory import ModelDirectory
from t5x_like.storage.reading import Place

# How the matrices of a model may be held; see `t5x_like.load`.
DTYPES = ("compute", "stored", *dtypes.NAMES, "int8")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """start_id: the token that the decoder of an encoder-decoder begins with. checkpoint: where the parameters were
    read, if that is one of ours. mesh: where they lie, None for one device.
    """

    model: Model
    params: Tree
    vocabulary: Vocabulary
    start_id: int = 0
    checkpoint: str | None = None
    mesh: Mesh | None = None


def read(
    directory: str,
    *,
    step: int | None,
    ema: bool,
    mesh: Mesh | None,
    rules: str,
    dtype: str,
    onto: Loaded | None,
    base: str | None,
) -> Loaded:
    """As `t5x_like.load`. onto: of an adapter, its base if that is read already; base: a path of it."""
    platform = (jax.local_devices() if mesh is None else list(mesh.devices.flat))[0].platform
    if is_foreign(directory):
        if step is not None or ema:
            raise UsageError(f"{directory} is no workdir: it holds no steps and no averaged parameters")
        if onto is not None or base is not None:
            raise UsageError(f"load: {directory} is no adapter that names its base; load it without base")
        return _foreign(directory, mesh=mesh, rules=rules, dtype=dtype, platform=platform)
    place = model_directory.locate(directory, step=step)
    metadata = model_directory.read_metadata(place.checkpoint)
    # Of the config only the model's section: what trained it may have had other fields, or none.
    config = model_config.resolve(metadata["config"]["model"])
    vocabulary = _vocabulary(directory, place, metadata)
    item = "ema" if ema else "params"
    model = roles.build_model(config, rules=rules, platform=platform) if onto is None else onto.model
    mesh = mesh if onto is None else onto.mesh
    put = functools.partial(_templates, model, mesh, dtype="stored")
    if onto is None:
        wanted = _templates(model, mesh, model.specs(), dtype)
        quantized = {"kinds": quant_array.KINDS, "place": _place(model, mesh)}
        at = None if base is None else patterns.one(base)
        params = adapters.restore_attached(place.checkpoint, item, model, wanted, put, base=at, **quantized)
    else:
        params = adapters.restore_onto(onto.params, model, onto.checkpoint, place.checkpoint, item, put)
    return Loaded(model, params, vocabulary, start_id(model, metadata, vocabulary), place.checkpoint, mesh)


def _vocabulary(directory: str, place: ModelDirectory, metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer beside a checkpoint, which must be that of its training."""
    if not paths.exists(place.tokenizer):
        raise UserError(f"{directory} holds no tokenizer; copy the folder {place.tokenizer} from where it came from")
    with paths.local_copy(place.tokenizer) as folder:
        vocabulary = vocabularies.load(folder)
    # A converted model may have had its tokenizer put beside it later: then there is nothing to compare with.
    recorded = metadata.get("provenance", {}).get("tokenizer", vocabulary.fingerprint)
    if vocabulary.fingerprint != recorded:
        raise UserError(
            f"{place.tokenizer} is not the tokenizer that {place.checkpoint} was trained with; restore that folder"
        )
    return _with_template_of_run(vocabulary, metadata["config"])


def _with_template_of_run(vocabulary: Vocabulary, config: Mapping[str, Any]) -> Vocabulary:
    """With the chat template that the config of a run names, where its tokenizer's folder has none."""
    section = (config.get("data") or {}).get("chat")
    if vocabulary.chat_template or not section:
        return vocabulary
    return vocabulary.with_chat_template(named_text(section["template"], vocabulary, system=section["system"]))


def start_id(model: Model, note: Mapping[str, Any], vocabulary: Vocabulary) -> int:
    """What the decoder behind an encoder begins with: as the data of a run said, or the folder that it was converted
    from; else 0, as T5."""
    name = note.get("config", {}).get("data", {}).get("start_token")
    if name is not None and model.config.architecture == "encoder_decoder":
        return source_target.start_id(name, vocabulary)
    stored = [(note.get(part) or {}).get("decoder_start_token_id") for part in ("generation_config", "token_ids")]
    return next((token for token in stored if isinstance(token, int)), 0)


def _templates(model: Model, mesh: Mesh | None, specs: Tree, dtype: str) -> dict[str, Any]:
    """Where each parameter shall lie, and in which type."""
    held = {"compute": model.dtypes.compute, "int8": model.dtypes.compute, "stored": None}.get(dtype, dtype)
    specs = specs if held is None else in_dtype(specs, held)

    def template(path: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        del path
        sharding = None if mesh is None else named(mesh, model.rules, spec.axes, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    plain = tree.map_with_path(template, specs)
    return quantizing.templates(specs, plain, _place(model, mesh)) if dtype == "int8" else plain


def _place(model: Model, mesh: Mesh | None) -> Place:
    """Where a leaf, or a part of one in several parts, shall lie; None for the first device."""
    specs = tree.flatten(model.specs())

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
        if mesh is None:
            return None
        spec = specs[path] if path in specs else specs[path.rpartition("/")[0]]
        # A scale has dims of size 1 where its weight has been summed.
        axes = tuple(
            axis if size == shape[dim] else None
            for dim, (axis, size) in enumerate(zip(spec.axes, spec.shape, strict=True))
        )
        return named(mesh, model.rules, axes, shape)

    return place


def _foreign(directory: str, *, mesh: Mesh | None, rules: str, dtype: str, platform: str) -> Loaded:
    with open_foreign(directory) as foreign:
        if not foreign.tokenizer:
            raise UserError(f"{directory} holds no tokenizer; copy its tokenizer.json there")
        vocabulary = vocabularies.load(os.path.dirname(foreign.tokenizer[0]))
        models: list[Model] = []

        def templates(config: model_config.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
            models.append(roles.build_model(config, rules=rules, platform=platform))
            return tree.flatten(_templates(models[0], mesh, models[0].specs(), dtype))

        def packed(path: str, values: np.ndarray, scale: np.ndarray) -> QuantArray:
            spec = tree.flatten(models[0].specs())[path]
            return quantizing.placed(path, values, scale, spec.axes, _place(models[0], mesh))

        params = load_params(foreign, templates, packed=packed)
    return Loaded(models[0], params, vocabulary, start_id(models[0], foreign.extra, vocabulary), mesh=mesh)
