"""LoRA adapters as the peft package saves them: adapter_config.json and adapter_model.safetensors.

The names of modules are those of the model's tensors; the rows of the family's table say which of our weights a module
is, and in which order it holds their dims (peft_matrices.py). Which weights are adapted is not decided here.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.convert import native, safetensors
from t5x_like.convert import peft_matrices as matrices
from t5x_like.convert.families import FAMILIES
from t5x_like.convert.huggingface import read_object
from t5x_like.convert.layout import Layout, Span
from t5x_like.convert.mapping import FLOATS, ModelMap, Tensor
from t5x_like.core.errors import UserError
from t5x_like.models.config import ModelConfig
from t5x_like.storage import paths

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
EMBEDDING = "embed/tokens"
TABLES = {EMBEDDING, "head/weight"}  # of the vocabulary
# Fields that make an adapter something else than x W + s (x A) B on matrices; none of them may be set.
_FOREIGN = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("target_parameters", "exclude_modules_to_save", "megatron_config"),
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
    """alpha: s is alpha / rank, or alpha / sqrt(rank) if rank_stabilized. base: where its model is, in peft's words: a
    folder or a name on the hub. copies: weights of that model by path, which peft saves beside what adapts them."""

    factors: Mapping[str, Factors]
    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float
    base: str
    copies: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def scale(self, rank: int, alpha: float | None = None) -> float:
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(paths.normal(path), CONFIG))


def write(folder: str, config: ModelConfig, adapter: PeftAdapter) -> None:
    """Puts both files into a folder. Raises UserError for an embedding that is the LM head too, or of two stacks."""
    mapping = _mapping(config, where=folder)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, parts in _by_module(mapping, adapter).items():
        path, layout, rank, _ = parts[0]
        names = _names(module, path)
        if path in TABLES:
            _check_table(path, config)
            (_, _, _, (a, b)) = parts[0]
            pair = matrices.table_to_theirs(a, b, config.vocab_size, lookup=path == EMBEDDING)
        elif layout.part is None:
            pair = matrices.to_theirs(layout, *parts[0][3])
        else:
            pair, rank, alphas[module] = _fused(parts, adapter)
        ranks[module] = rank
        tensors |= dict(zip(names, pair, strict=True))
    writer = safetensors.Writer(os.path.join(folder, WEIGHTS), {n: (t.shape, t.dtype) for n, t in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, Span(tensor.shape, tuple((0, size) for size in tensor.shape)), np.ascontiguousarray(tensor))
    writer.close()
    paths.write_json_atomic(os.path.join(folder, CONFIG), _settings(config, adapter, mapping, ranks, alphas))


_Part = tuple[str, Layout, int, matrices.Pair]  # path, layout, rank, (a, b) of one layer of a weight


def _by_module(mapping: ModelMap, adapter: PeftAdapter) -> dict[str, list[_Part]]:
    """The weights of each module that is adapted, one layer of each."""
    found: dict[str, list[_Part]] = {}
    for path in mapping.tensors:
        if path not in adapter.factors:
            continue
        factors = adapter.factors[path]
        for layer, (tensor, rank) in enumerate(zip(mapping.tensors[path], factors.ranks, strict=True)):
            if rank:
                pair = (factors.a[layer][..., :rank], factors.b[layer][:rank])
                found.setdefault(_module(tensor, path), []).append((path, tensor.layout, rank, pair))
    return found


def _fused(parts: Sequence[_Part], adapter: PeftAdapter) -> tuple[matrices.Pair, int, float]:
    """((A, B), rank, alpha) of a module that holds several of our weights: its scale is that of the first, and the B of
    weights with another rank make up for it."""
    _, layout, first, _ = parts[0]
    scale = adapter.scale(first)
    given = []
    for _, its, rank, (a, b) in parts:
        assert its.part is not None
        ratio = np.float32(adapter.scale(rank) / scale)
        given.append((its.part, matrices.to_theirs(its, a, b if rank == first else b * ratio)))
    rank = sum(part[2] for part in parts)
    alpha = adapter.alpha * rank / first  # 3 alpha for three of one rank
    if adapter.rank_stabilized:
        alpha = scale * math.sqrt(rank)
    return matrices.together(given, layout.sizes[matrices.PART]), rank, alpha


def read(folder: str, config: ModelConfig) -> PeftAdapter:
    """An adapter of a model with this config. Raises UserError for what is no plain LoRA of its weights."""
    place = paths.normal(folder)
    settings = read_object(os.path.join(place, CONFIG))
    where = os.path.join(place, CONFIG)
    _require_plain(settings, where)
    mapping = _mapping(config, where=where)
    with safetensors.open_file(os.path.join(place, WEIGHTS)) as file:
        found = {name: _read(file, name, described) for name, described in file.described().items()}
    plain = PeftAdapter(
        {},
        rank=_number(settings, "r", where),
        alpha=float(_number(settings, "lora_alpha", where)),
        rank_stabilized=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        base=str(settings.get("base_model_name_or_path") or ""),
        copies=_copies(found, mapping),
    )
    pairs = _pairs(found, os.path.join(place, WEIGHTS))
    known = {tensor.name.removesuffix(".weight") for tensors in mapping.tensors.values() for tensor in tensors}
    if pairs.keys() - known:
        unknown = next(module for module in pairs if module not in known)
        raise UserError(f"{where}: {unknown!r} is no module of this model's layers; give its base as --base")
    factors = {}
    for path, tensors in mapping.tensors.items():
        modules = [tensor.name.removesuffix(".weight") for tensor in tensors]
        if any(module in pairs for module in modules):
            alphas = [_alpha(settings, module, plain.alpha) for module in modules]
            factors[path] = _stacked(path, mapping, [pairs.get(m) for m in modules], alphas, plain, config, where)
    return dataclasses.replace(plain, factors=factors)


def _mapping(config: ModelConfig, *, where: str) -> ModelMap:
    if config.family not in FAMILIES:
        raise UserError(f"{where}: the family {config.family} is not one of Hugging Face, where peft's modules are")
    return native.model_map(FAMILIES[config.family].table, config)


def _module(tensor: Tensor, path: str) -> str:
    layout = tensor.layout
    side_by_side = all(group.index(matrices.PART) == 0 for group in layout.theirs if matrices.PART in group)
    if len(layout.theirs) != 2 or (layout.part is not None and (not side_by_side or layout.theirs[0][0] == "part")):
        raise UserError(f"{path!r} is a part of {tensor.name!r} there, which has no adapter of such a form; merge it")
    return tensor.name.removesuffix(".weight")


def _names(module: str, path: str) -> tuple[str, str]:
    """Of A and B."""
    name = f"{_PREFIX}{module}.lora_"
    if path == EMBEDDING:
        return f"{name}embedding_A", f"{name}embedding_B"
    return f"{name}A.weight", f"{name}B.weight"


def _check_table(path: str, config: ModelConfig) -> None:
    """UserError for a table that is more than one module there."""
    if config.head.tied:
        raise UserError(
            f"{path!r} is both the embedding and the LM head of this model (tied), of which peft adapts one: merge the "
            "adapter, or adapt other matrices"
        )
    if path == EMBEDDING and config.encoder is not None and config.decoder is not None:
        raise UserError(f"{path!r} is the embedding of two stacks, which peft does not adapt together: merge it")


def _settings(
    config: ModelConfig,
    adapter: PeftAdapter,
    mapping: ModelMap,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    modules = [tensor.name for tensors in mapping.tensors.values() for tensor in tensors]
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
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items() if alpha != adapter.alpha},
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


def _alpha(settings: Mapping[str, Any], module: str, usual: float) -> float:
    """Of a module, as peft looks it up: the first pattern that its name ends with."""
    patterns = settings.get("alpha_pattern") or {}
    return float(next((a for p, a in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", module)), usual))


def _copies(found: dict[str, np.ndarray], mapping: ModelMap) -> dict[str, np.ndarray]:
    """Takes out the tables of the vocabulary that peft saves whole as soon as one of them is adapted."""
    copies = {}
    for path in TABLES & mapping.tensors.keys():
        module = mapping.tensors[path][0].name.removesuffix(".weight")
        for name in (f"{_PREFIX}{module}.base_layer.weight", f"{_PREFIX}{module}.weight"):
            if name in found:
                copies[path] = found.pop(name)
    return copies


def _pairs(found: Mapping[str, np.ndarray], where: str) -> dict[str, matrices.Pair]:
    """module -> (A, B)."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in found.items():
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", name)
        if match is None or array.ndim != 2:
            raise UserError(f"{where}: {name!r} is no A or B of a matrix or an embedding, which is all that is read")
        parts.setdefault(match[1], {})[match[2] or match[3]] = array
    for module, pair in parts.items():
        if len(pair) != 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise UserError(f"{where}: A and B of {module!r} do not fit each other; copy the file again")
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def _stacked(
    path: str,
    mapping: ModelMap,
    layers: Sequence[matrices.Pair | None],
    alphas: Sequence[float],
    adapter: PeftAdapter,
    config: ModelConfig,
    where: str,
) -> Factors:
    """All layers of one weight; those of a lower rank than others are filled up with zeros."""
    pairs: list[matrices.Pair | None] = []
    for tensor, theirs, alpha in zip(mapping.tensors[path], layers, alphas, strict=True):
        if theirs is None:
            pairs.append(None)
            continue
        _module(tensor, path)
        _check_sizes(tensor, theirs, where)
        scale = adapter.scale(len(theirs[0]), alpha)
        if path in TABLES:
            _check_table(path, config)
            a, b = matrices.table_to_ours(theirs, mapping.leaves[path].shape[0], lookup=path == EMBEDDING)
        else:
            layout = tensor.layout
            if layout.part is not None:
                theirs = matrices.apart(theirs, layout.part, layout.sizes[matrices.PART])
            a, b = matrices.to_ours(layout, theirs)
        ratio = scale / adapter.scale(len(b))  # 1 unless this module has an alpha of its own
        pairs.append((a, b if math.isclose(ratio, 1.0, rel_tol=1e-9) else b * np.float32(ratio)))
    ranks = tuple(0 if pair is None else len(pair[1]) for pair in pairs)
    (a, b) = next(pair for pair in pairs if pair is not None)
    empty = (np.zeros((*a.shape[:-1], 0), np.float32), np.zeros((0, *b.shape[1:]), np.float32))
    filled = [_filled(*(pair or empty), max(ranks)) for pair in pairs]
    return Factors(np.stack([a for a, _ in filled]), np.stack([b for _, b in filled]), ranks)


def _filled(a: np.ndarray, b: np.ndarray, rank: int) -> matrices.Pair:
    """With zeros for the columns that are missing to a rank."""
    spare = (0, rank - len(b))
    return np.pad(a, [(0, 0)] * (a.ndim - 1) + [spare]), np.pad(b, [spare] + [(0, 0)] * (b.ndim - 1))


def _check_sizes(tensor: Tensor, theirs: matrices.Pair, where: str) -> None:
    sizes = [math.prod(tensor.layout.sizes[dim] for dim in group) for group in tensor.layout.theirs]
    a, b = theirs
    if sorted((a.shape[1], b.shape[0])) != sorted(sizes):
        raise UserError(
            f"{where}: {tensor.name!r} is a matrix of {sizes[0]} x {sizes[1]} here, and the adapter's of "
            f"{b.shape[0]} x {a.shape[1]}; it belongs to another model"
        )
