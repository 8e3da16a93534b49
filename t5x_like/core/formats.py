"""The formats of what a run stores (config.json, checkpoints), and what each format changed: one literal table.

A stored object says `format`; a config without it is of format 1. Readers of stored configs upgrade them, one format
after the other; config files are not stored and stay strict. A new format is one entry of TABLE and a new FORMAT: a
field is added with the value that runs of older formats had in effect, so that they go on to the same bits.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from t5x_like.core.errors import UserError

FORMAT = 8


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a config. Paths are dotted, below the config: `optim.learning_rate`.

    where: it is made only in configs that have these values at these paths, as they are before the format's changes
    moves: old path -> new path, of a field or a section; a path that a config lacks is left out
    drops: paths of fields and sections that are no more
    adds: path -> value, in this order, where the path has no value yet. Its section must be there: a variant that is
        not named is not stored, and gets no field
    named: section -> its variants, of which only that one is kept that the section's `name` names
    """

    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    moves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    drops: tuple[str, ...] = ()
    adds: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


# Of the scaling of rotary positions, whose fields stood flat, the named variant is kept.
_SCALING = Change(
    where={"model.rope.scaling.name": "llama3"},
    moves={
        f"model.rope.scaling.{name}": f"model.rope.scaling.llama3.{name}"
        for name in ("factor", "low_frequency", "high_frequency", "original_length")
    },
)
_NO_SCALING = Change(where={"model.rope.scaling.name": "none"}, drops=tuple(_SCALING.moves))
# What a model of format 1 was: one decoder, whose fields stood flat in the section `model`.
_STACKS = Change(
    moves={
        **{
            f"model.{name}": f"model.decoder.{name}"
            for name in (
                *("layers", "heads", "kv_heads", "mlp", "norm", "norm_epsilon", "position", "rope", "windows"),
                *("activation", "gated", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "attention_softcap"),
            )
        },
        "model.head": "model.decoder.head_size",
        "model.embed": "model.width",
        "model.tie_embeddings": "model.head.tied",
        "model.final_softcap": "model.head.softcap",
        "model.init_deviation": "model.init.std",
        "model.depth_scaled_init": "model.init.depth_scaled",
    },
    adds={
        "model.architecture": "decoder",
        "model.encoder": None,
        "model.embedding": {"scale": 1.0, "norm": False, "types": 0, "offset": 0},
        "model.decoder.norm_order": "pre",
        "model.decoder.parallel": False,
        "model.decoder.attention_scale": 0.0,
        "model.decoder.final_norm": True,
        "model.decoder.relative": {"buckets": 32, "max_distance": 128},
        "model.head.scale": 1.0,
        "model.head.bias": False,
        "model.head.transform": False,
        "model.init.name": "normal",
    },
)
# What rows become was not asked: plain text or examples, for a decoder.
_FEATURES = Change(
    adds={
        "data.features": "causal",
        "data.encoder_length": 0,
        "data.start_token": "pad",
        "data.extra_ids": 0,
        "data.prefix": False,
        "data.span_corruption": {"noise_density": 0.15, "mean_span_length": 3.0},
        **{f"data.fields.{name}": "" for name in ("prompt", "chosen", "rejected", "label")},
        "checkpoint.holds": "model",
    }
)
# An example that was longer than its row lost its end.
_TRUNCATE = Change(adds={"data.truncate": {"rule": "end", "inputs": "left", "min_targets": 0}})
# A bad record ended a run.
_BAD_RECORDS = Change(adds={"data.on_bad_record": "stop", "data.max_bad_share": 0.01})
# A run had one model.
_ROLES = Change(adds={"roles": {}})
# A run began with parameters alone.
_BRANCH = Change(adds={"checkpoint.branch_from": None})
# Metrics went to metrics.jsonl and TensorBoard alone.
_TRACKERS = Change(
    adds={
        "telemetry.wandb": {"project": "", "mode": "offline"},
        "telemetry.mlflow": {"uri": "", "experiment": "t5x_like"},
    }
)
# All parameters of the model were trained.
_ADAPTER = Change(adds={"adapter": {"name": "none"}})
# An example was inputs and targets, without a template.
_CHAT = Change(
    adds={"data.fields.messages": "", "data.chat": {"template": "none", "train_on": "assistant", "system": ""}}
)
# A model had an LM head alone.
_HEADS = Change(adds={"model.scalar_heads": ()})
# The separator of CSV was found, never given.
_CSV = Change(adds={"data.csv_separator": ""})
# Answers were drawn with the weights as they lie in training.
_ROLLOUT_WEIGHTS = Change(adds={"rl.weights": "sharded"})
# The answers of decoders were encoded as texts of their own.
_ANSWERS = Change(adds={"data.answers": "apart"})
# Each answer had a row of its own.
_ANSWERS_PER_ROW = Change(adds={"rl.answers_per_row": 1})
# Nothing lay on the mesh axis `stage`.
_PIPELINE = Change(adds={"mesh.pipeline": {"micro_batches": None, "repeats": 1}})
# All products were in the compute type.
_PRODUCTS = Change(adds={"model.dtype.products": "compute"})
# Blocks of the TPU's attention kernels had one size.
_ATTENTION_BLOCK = Change(adds={"model.attention_block": 1024})
# Format -> what it changed of the format before.
TABLE: Mapping[int, tuple[Change, ...]] = {
    2: (
        Change(
            named={
                "optim": ("adamw", "adafactor", "lion", "muon", "sgd"),
                "optim.schedule": ("cosine", "linear", "rsqrt", "warmup_stable_decay"),
                "objective": ("lm",),
            }
        ),
        _SCALING,
        _NO_SCALING,
        _STACKS,
        _FEATURES,
        _ROLES,
    ),
    3: (_TRUNCATE, _BAD_RECORDS, _BRANCH, _TRACKERS),
    4: (_HEADS, _CSV, _ADAPTER, _CHAT),
    5: (_ROLLOUT_WEIGHTS, _ANSWERS),
    6: (_ANSWERS_PER_ROW,),
    7: (_PIPELINE, _PRODUCTS),
    8: (_ATTENTION_BLOCK,),
}


def version(content: Mapping[str, Any], *, where: str) -> int:
    """The format of a stored object. Raises UserError for one that is newer than this program, or none at all."""
    found = content.get("format", 1)
    if type(found) is not int or found < 1:
        raise UserError(f"{where} is damaged: its format is {found!r}, not a number from 1 to {FORMAT}")
    if found > FORMAT:
        raise UserError(f"{where} is of format {found}, and this program knows up to {FORMAT}; use a newer t5x_like")
    return found


def upgrade(
    config: Mapping[str, Any],
    *,
    where: str,
    table: Mapping[int, tuple[Change, ...]] = TABLE,
) -> dict[str, Any]:
    """The sections of a stored config as this program has them, without `format`. The given one is not changed."""
    current = _copied({name: section for name, section in config.items() if name != "format"})
    for number in range(version(config, where=where) + 1, max(table, default=1) + 1):
        chosen = [change for change in table[number] if _matches(current, change.where)]
        for change in chosen:
            _apply(current, change)
    return current


def stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of a config: its sections and the format."""
    return {"format": FORMAT, **config}


def _apply(config: dict[str, Any], change: Change) -> None:
    # All are taken before one is put, so that two fields may change places.
    taken = {new: _take(config, old) for old, new in change.moves.items()}
    for path in change.drops:
        _take(config, path)
    for path, variants in change.named.items():
        for name in _values(config, f"{path}.name"):
            for variant in variants:
                if variant != name:
                    _take(config, f"{path}.{variant}")
    for path, found in taken.items():
        for value in found:
            section, name = _section(config, path, make=True)
            section[name] = value
    for path, value in change.adds.items():
        section, name = _section(config, path, make=False)
        if section is not None:
            section.setdefault(name, _copied(value))


def _matches(config: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return all(list(_values(config, path)) == [value] for path, value in values.items())


def _values(config: Mapping[str, Any], path: str) -> Iterator[Any]:
    """The value at a path, or nothing."""
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return
        node = node[part]
    yield node


def _take(config: dict[str, Any], path: str) -> list[Any]:
    """The value at a path, taken out, in a list; [] if there is none."""
    section, name = _section(config, path, make=False)
    return [section.pop(name)] if section is not None and name in section else []


def _section(config: dict[str, Any], path: str, *, make: bool) -> tuple[Any, str]:
    """(the section that holds the field of a path, or None; the field's name)."""
    *sections, name = path.split(".")
    node: Any = config
    for part in sections:
        if make:
            node = node.setdefault(part, {})
        elif not isinstance(node.get(part), dict):
            return None, name
        else:
            node = node[part]
    return node, name


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value
