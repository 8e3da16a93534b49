"""LoRA adapters as the peft package saves them: adapter_config.json and adapter_model.safetensors.

There A is [rank, in] and B is [out, rank] for each module, whose names are those of the model's tensors; the rows of
the family's table say which of our weights a module is, and in which order it holds their dims. What the numbers mean
(scales, which weights) is not decided here.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.convert import native, safetensors
from t5x_like.convert.families import FAMILIES
from t5x_like.convert.huggingface import read_object
from t5x_like.convert.layout import Layout, Span
from t5x_like.convert.mapping import FLOATS, ModelMap, Tensor
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig
from t5x_like.storage import paths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields that make an adapter something else than x W + s (x A) B on matrices; none of them may be set.
_FOREIGN = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("alpha_pattern", "target_parameters", "exclude_modules_to_save", "megatron_config"),
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one weight of ours: a [layers, inputs ..., rank], b [layers, rank, outputs ...], and the rank of each layer,
    0 for none; a weight that is not stacked has one of each."""

    a: np.ndarray
    b: np.ndarray
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """alpha: s is alpha / rank, or alpha / sqrt(rank) if rank_stabilized."""

    factors: Mapping[str, Factors]
    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float
    base: str  # where its model is, in peft's words: a folder or a name on the hub


def is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(paths.normal(path), CONFIG))


def write(folder: str, config: ModelConfig, adapter: PeftAdapter) -> None:
    """Puts both files into a folder. Raises UserError for a weight that is part of a larger tensor there (GPT-2)."""
    mapping = _mapping(config, where=folder)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for path, factors in adapter.factors.items():
        for layer, (tensor, rank) in enumerate(zip(mapping.tensors[path], factors.ranks, strict=True)):
            if rank:
                module, layout = _module(tensor, path), tensor.layout
                a, b = factors.a[layer][..., :rank], factors.b[layer][:rank]
                ranks[module] = rank
                tensors[f"{_PREFIX}{module}.lora_A.weight"] = _matrix(layout, a, a.ndim - 1, inputs=True)
                tensors[f"{_PREFIX}{module}.lora_B.weight"] = _matrix(layout, b, a.ndim - 1, inputs=False)
    writer = safetensors.Writer(os.path.join(folder, WEIGHTS), {n: (t.shape, t.dtype) for n, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, Span(tensor.shape, tuple((0, size) for size in tensor.shape)), np.ascontiguousarray(tensor))
    writer.close()
    paths.write_json_atomic(os.path.join(folder, CONFIG), _settings(config, adapter, mapping, ranks))


def read(folder: str, config: ModelConfig) -> PeftAdapter:
    """An adapter of a model with this config. Raises UserError for what is no plain LoRA of its matrices."""
    place = paths.normal(folder)
    settings = read_object(os.path.join(place, CONFIG))
    where = os.path.join(place, CONFIG)
    _require_plain(settings, where)
    _require_known(settings, where)
    mapping = _mapping(config, where=where)
    with safetensors.open_file(os.path.join(place, WEIGHTS)) as file:
        found = {name: _read(file, name, described) for name, described in file.described().items()}
    pairs = _pairs(found, os.path.join(place, WEIGHTS))
    factors = {}
    for path, tensors in mapping.tensors.items():
        modules = [tensor.name.removesuffix(".weight") for tensor in tensors]
        if any(module in pairs for module in modules):
            layers = [pairs.pop(module, None) for module in modules]
            factors[path] = _stacked(path, tensors, layers, where)
    if pairs:
        raise UserError(f"{where}: {next(iter(pairs))!r} is no module of this model's layers; give its base as --base")
    return PeftAdapter(
        factors,
        rank=_number(settings, "r", where),
        alpha=float(_number(settings, "lora_alpha", where)),
        rank_stabilized=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        base=str(settings.get("base_model_name_or_path") or ""),
    )


def _mapping(config: ModelConfig, *, where: str) -> ModelMap:
    if config.family not in FAMILIES:
        raise UserError(f"{where}: the family {config.family} is not one of Hugging Face, where peft's modules are")
    return native.model_map(FAMILIES[config.family].table, config)


def _module(tensor: Tensor, path: str) -> str:
    if tensor.layout.part is not None or len(tensor.layout.theirs) != 2:
        raise UserError(
            f"{path!r} is a part of {tensor.name!r} there, whose adapter peft has for the whole; adapt other matrices, "
            "or merge it"
        )
    return tensor.name.removesuffix(".weight")


def _matrix(layout: Layout, ours: np.ndarray, inputs_count: int, *, inputs: bool) -> np.ndarray:
    """[rank, in] of our A [inputs ..., rank], or [out, rank] of our B [rank, outputs ...]."""
    names, order = _side(layout, inputs_count, inputs=inputs)
    moved = ours if inputs else np.moveaxis(ours, 0, -1)
    joined = moved.transpose(*(names.index(name) for name in order), len(names)).reshape(-1, moved.shape[-1])
    return joined.T if inputs else joined


def _unmatrix(layout: Layout, theirs: np.ndarray, inputs_count: int, *, inputs: bool) -> np.ndarray:
    """The inverse of `_matrix`."""
    names, order = _side(layout, inputs_count, inputs=inputs)
    joined = theirs.T if inputs else theirs
    split = joined.reshape(*(layout.sizes[name] for name in order), joined.shape[-1])
    moved = split.transpose(*(order.index(name) for name in names), len(order))
    return moved if inputs else np.moveaxis(moved, -1, 0)


def _side(layout: Layout, inputs_count: int, *, inputs: bool) -> tuple[list[str], list[str]]:
    """The dims of one side of a matrix: in our order, and in theirs."""
    groups = layout.ours[:inputs_count] if inputs else layout.ours[inputs_count:]
    names = [name for group in groups for name in group]
    order = next(list(group) for group in layout.theirs if set(group) == set(names))
    return names, order


def _settings(config: ModelConfig, adapter: PeftAdapter, mapping: ModelMap, ranks: Mapping[str, int]) -> dict[str, Any]:
    modules = [tensor.name for tensors in mapping.tensors.values() for tensor in tensors if tensor.layout.part is None]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if config.encoder is not None and config.decoder is not None else "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
        "target_modules": _targets([name.removesuffix(".weight") for name in modules], ranks),
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items() if rank != adapter.rank},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",  # its matrices are stored [in, out]
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _targets(known: Sequence[str], chosen: Mapping[str, int]) -> list[str]:
    """Last parts of names where all modules that end so are adapted, else whole names."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in chosen)
    whole = {end for end in ends if all(name in chosen for name in known if name.rpartition(".")[2] == end)}
    return [*sorted(whole), *(name for name in chosen if name.rpartition(".")[2] not in whole)]


def _require_plain(settings: Mapping[str, Any], where: str) -> None:
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type={settings.get('peft_type')!r} is not read; expected 'LORA'")
    for name in _FOREIGN:
        if settings.get(name):
            raise UserError(f"{where}: {name}={settings[name]!r} is not read; expected a LoRA of matrices alone")
    if settings.get("bias", "none") != "none":
        raise UserError(f"{where}: bias={settings['bias']!r} is not read; expected 'none'")


# Fields that are read, or change nothing of what a trained adapter computes; any other must not be set.
_HARMLESS = frozenset(
    "peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern fan_in_fan_out bias init_lora_weights eva_config megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
# How a training may begin that leaves the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, ...) change it.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


def _require_known(settings: Mapping[str, Any], where: str) -> None:
    for name, value in settings.items():
        if name not in _HARMLESS and value:
            raise UserError(f"{where}: {name}={value!r:.80} is not read; expected a LoRA of matrices alone")
    begun = settings.get("init_lora_weights")
    if begun not in _BEGINNINGS:
        raise UserError(
            f"{where}: init_lora_weights={begun!r:.80} changed the base that the adapter is on; save it converted to a "
            "plain LoRA (peft: save_pretrained(path_initial_model_for_weight_conversion=...))"
        )


def _number(settings: Mapping[str, Any], name: str, where: str) -> Any:
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{where}: {name}={value!r} should be a number above 0")
    return value


def _read(file: Any, name: str, described: tuple[tuple[int, ...], np.dtype]) -> np.ndarray:
    shape, dtype = described
    if dtype.name not in FLOATS:
        raise UserError(f"{file.where}: {name!r} is stored as {dtype.name}; expected {', '.join(FLOATS)}")
    array = file.read(name, Span(shape, tuple((0, size) for size in shape))).astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{file.where}: {name!r} holds NaN or infinity; it is no trained adapter")
    return array


def _pairs(found: Mapping[str, np.ndarray], where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """module -> (A, B)."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in found.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight", name)
        if match is None or array.ndim != 2:
            raise UserError(f"{where}: {name!r} is no A or B of a matrix in a layer, which is all that is read")
        parts.setdefault(match[1], {})[match[2]] = array
    for module, pair in parts.items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise UserError(f"{where}: A and B of {module!r} do not fit each other; copy the file again")
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def _stacked(
    path: str, tensors: Sequence[Tensor], layers: Sequence[tuple[np.ndarray, np.ndarray] | None], where: str
) -> Factors:
    """All layers of one weight; those of a lower rank than others are filled up with zeros."""
    ranks = tuple(0 if pair is None else len(pair[0]) for pair in layers)
    a_layers, b_layers = [], []
    for tensor, pair in zip(tensors, layers, strict=True):
        _module(tensor, path)
        sizes = [math.prod(tensor.layout.sizes[dim] for dim in group) for group in tensor.layout.theirs]
        inputs = _inputs(tensor.layout)
        if pair is None:
            sides = [tensor.layout.sizes[name] for group in tensor.layout.ours for name in group]
            a_layers.append(np.zeros((*sides[:inputs], max(ranks)), np.float32))
            b_layers.append(np.zeros((max(ranks), *sides[inputs:]), np.float32))
            continue
        a, b = pair
        if sorted((a.shape[1], b.shape[0])) != sorted(sizes):
            raise UserError(
                f"{where}: {tensor.name!r} is a matrix of {sizes[0]} x {sizes[1]} here, and the adapter's of "
                f"{b.shape[0]} x {a.shape[1]}; it belongs to another model"
            )
        a, b = _unmatrix(tensor.layout, a, inputs, inputs=True), _unmatrix(tensor.layout, b, inputs, inputs=False)
        spare = max(ranks) - a.shape[-1]
        a_layers.append(np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, spare)]))
        b_layers.append(np.pad(b, [(0, spare)] + [(0, 0)] * (b.ndim - 1)))
    return Factors(np.stack(a_layers), np.stack(b_layers), ranks)


def _inputs(layout: Layout) -> int:
    """How many of our dims are inputs: ours come first, and theirs are one of the two groups."""
    for count in range(1, len(layout.ours)):
        names = {name for group in layout.ours[:count] for name in group}
        if any(set(group) == names for group in layout.theirs):
            return count
    raise ValueError(f"{layout.theirs} is no matrix")
