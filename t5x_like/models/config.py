"""What a model is, in numbers and names: `ModelConfig`, and `resolve`, which fills a section from family and size.

Not here: the numbers of the families (families/) and anything that computes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from t5x_like.core import config as bridge
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers.block import BlockConfig, LayerKind
from t5x_like.layers.mlp import ACTIVATIONS
from t5x_like.layers.norms import NORMS
from t5x_like.layers.positions import SCALINGS, RopeScaling
from t5x_like.layers.stack import REMAT
from t5x_like.models.families import FAMILIES

POSITIONS = ("rope", "learned")
CUSTOM = "custom"  # the size that supplies nothing


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """theta: base, one value for all layers or one for each entry of `windows`."""

    theta: tuple[float, ...]
    scaling: RopeScaling


@dataclasses.dataclass(frozen=True)
class DtypeConfig:
    """Number formats by name (core/dtypes.py). compute "auto": by platform."""

    params: str
    compute: str


@dataclasses.dataclass(frozen=True)
class ModelConfig(BlockConfig):
    """The section `model` of a config; the fields of one layer are BlockConfig's.

    vocab_size: tokens; stored rows are rounded up to vocab_multiple and masked. max_length: tokens. windows: how many
    tokens back each layer sees, itself included, 0 for all; a pattern repeated over the layers, (1024, 1024, 0) being
    two local and one global. final_softcap: of the logits, 0 for none. remat: a name in stack.REMAT.
    """

    family: str
    size: str
    vocab_size: int
    vocab_multiple: int
    max_length: int
    position: str
    rope: RopeConfig
    windows: tuple[int, ...]
    tie_embeddings: bool
    final_softcap: float
    scan: bool
    remat: str
    dtype: DtypeConfig

    def check(self, path: str) -> None:
        _check(self, path)

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The static differences of each layer."""
        thetas = self.rope.theta if self.position == "rope" else (0.0,)
        count = len(self.windows)
        thetas = thetas if len(thetas) == count else thetas * count
        pattern = [LayerKind(window, theta) for window, theta in zip(self.windows, thetas, strict=True)]
        return tuple(pattern[i % count] for i in range(self.layers))


def resolve(section: bridge.Values, *, path: str = "config.model") -> ModelConfig:
    """The model of a config section, in which None means: what family and size say."""
    return bridge.build(ModelConfig, filled(section, path=path), path=path)


def filled(section: bridge.Values, *, path: str = "config.model") -> dict[str, Any]:
    """The section with what family and size say in place of None.

    Raises UsageError for an unknown family, size, field or name, for a field that neither gives, and for numbers that
    do not fit together.
    """
    for field in ("family", "size"):
        if section.get(field) is None:
            raise UsageError(f"{path}.{field} is missing; give a name")
    name, size = str(section["family"]), str(section["size"])
    if name not in FAMILIES:
        raise UsageError(f"{path}.family={name!r} is unknown; {nearest(name, FAMILIES)}")
    family, sizes = FAMILIES[name]
    if size not in sizes and size != CUSTOM:
        raise UsageError(f"{path}.size={size!r} is unknown for {name}; {nearest(size, [*sizes, CUSTOM])}")
    supplied = _merge(family, sizes[size] if size != CUSTOM else {})
    return _fill(section, supplied, path, f"size {size!r} of {name}")


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections of both; `second` wins."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _fill(section: bridge.Values, supplied: Mapping[str, Any], path: str, source: str) -> dict[str, Any]:
    filled = {}
    values: dict[str, Any] = dict(section.items())
    for key, value in values.items():
        other = supplied.get(key)
        if isinstance(value, Mapping | ConfigDict):
            filled[key] = _fill(value, other if isinstance(other, Mapping) else {}, f"{path}.{key}", source)
        elif value is None and other is None:
            raise UsageError(f"{path}.{key} is not given, and {source} supplies none; set it")
        else:
            filled[key] = other if value is None else value
    return filled


def _check(c: ModelConfig, where: str) -> None:
    """Raises UsageError for names that are in no table and numbers that do not fit together."""
    names = {
        "norm": (c.norm, NORMS),
        "activation": (c.activation, ACTIVATIONS),
        "position": (c.position, POSITIONS),
        "remat": (c.remat, REMAT),
        "rope.scaling.name": (c.rope.scaling.name, SCALINGS),
    }
    for field, (name, table) in names.items():
        if name not in table:
            raise UsageError(f"{where}.{field}={name!r} is unknown; {nearest(name, table)}")
    for field in ("layers", "embed", "heads", "kv_heads", "head", "mlp", "vocab_size", "vocab_multiple", "max_length"):
        if getattr(c, field) < 1:
            raise UsageError(f"{where}.{field}={getattr(c, field)} should be at least 1")
    for field, value in (("norm_epsilon", c.norm_epsilon), ("init_deviation", c.init_deviation)):
        if not value > 0:
            raise UsageError(f"{where}.{field}={value:g} should be above 0")
    if c.position == "rope" and not min(c.rope.theta, default=0) > 0:
        raise UsageError(f"{where}.rope.theta={c.rope.theta} should be numbers above 0")
    if c.heads % c.kv_heads:
        raise UsageError(
            f"{where}.kv_heads={c.kv_heads} does not divide {where}.heads={c.heads}; each key-value head serves the "
            "same number of query heads"
        )
    if not c.windows or min(c.windows) < 0:
        raise UsageError(f"{where}.windows={c.windows} should be numbers of tokens, 0 for a layer that sees all")
    if len(c.windows) > c.layers:
        raise UsageError(f"{where}.windows={c.windows} has {len(c.windows)} entries for {c.layers} layers; shorten it")
    if len(c.rope.theta) not in (1, len(c.windows)):
        raise UsageError(
            f"{where}.rope.theta={c.rope.theta} should have one value, or one for each of the {len(c.windows)} entries "
            f"of {where}.windows"
        )
    if c.position == "rope" and c.head % 2:
        raise UsageError(f"{where}.head={c.head} is odd, but rotary positions turn pairs; use an even size")
    if not 0.0 <= c.dropout < 1.0:
        raise UsageError(f"{where}.dropout={c.dropout} should be at least 0 and below 1")
    _check_scaling(c.rope.scaling, f"{where}.rope.scaling")


def _check_scaling(c: RopeScaling, where: str) -> None:
    for field in ("factor", "low_frequency", "high_frequency", "original_length"):
        if not getattr(c, field) > 0:
            raise UsageError(f"{where}.{field}={getattr(c, field)} should be above 0")
    if c.name == "llama3" and not c.high_frequency > c.low_frequency:
        raise UsageError(
            f"{where}.high_frequency={c.high_frequency:g} should be above {where}.low_frequency={c.low_frequency:g}"
        )
