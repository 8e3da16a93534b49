"""What a model is, in numbers and names: `ModelConfig`, composed of stacks, and `resolve`, which fills a section from
family and size.

Not here: the numbers of the families (families/), one layer (layers/block.py), and anything that computes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from t5x_like.core import config as bridge
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers import remat
from t5x_like.layers.attention import kernels
from t5x_like.layers.block import BlockConfig, LayerKind
from t5x_like.layers.initialization import InitConfig
from t5x_like.layers.positions import RopeScaling
from t5x_like.models.families import FAMILIES
from t5x_like.models.families.plain import merged

# How the layers of a stack learn where a token stands.
POSITIONS = ("rope", "learned", "relative", "alibi", "none")
# The stacks of each architecture.
STACKS = {"decoder": ("decoder",), "encoder": ("encoder",), "encoder_decoder": ("encoder", "decoder")}
# Heads that read one number a token off the hidden states, beside the LM head (models/ends.py).
SCALAR_HEADS = ("reward",)
CUSTOM = "custom"  # the size that supplies nothing


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. theta: base, one value for all layers or one for each entry of `windows`; 0 turns nothing."""

    theta: tuple[float, ...]
    scaling: RopeScaling


@dataclasses.dataclass(frozen=True)
class RelativeConfig:
    """T5's relative positions (arXiv 1910.10683, section 2.1): a learned bias for each head and bucket of distances.

    buckets: their number, half of them exact and half growing with the logarithm of the distance; max_distance: tokens
    from which on all distances share the last bucket.
    """

    buckets: int
    max_distance: int


@dataclasses.dataclass(frozen=True)
class StackConfig(BlockConfig):
    """One stack of layers; the fields of its layers are BlockConfig's.

    position: a name in POSITIONS. windows: how many tokens back each layer sees, itself included, 0 for all; a pattern
    repeated over the layers, (1024, 1024, 0) being two local and one global. final_norm: whether a norm follows the
    last layer.
    """

    layers: int
    position: str
    rope: RopeConfig
    relative: RelativeConfig
    windows: tuple[int, ...]
    final_norm: bool

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The static differences of each layer."""
        thetas = self.rope.theta if self.position == "rope" else (0.0,)
        count = len(self.windows)
        thetas = thetas if len(thetas) == count else thetas * count
        pattern = [LayerKind(window, theta) for window, theta in zip(self.windows, thetas, strict=True)]
        return tuple(pattern[i % count] for i in range(self.layers))

    def check(self, path: str) -> None:
        """Raises UsageError for names that are in no table and numbers that do not fit together."""
        super().check(path)
        if self.layers < 1:
            raise UsageError(f"{path}.layers={self.layers} should be at least 1")
        if self.position not in POSITIONS:
            raise UsageError(f"{path}.position={self.position!r} is unknown; {nearest(self.position, POSITIONS)}")
        if not self.windows or min(self.windows) < 0:
            raise UsageError(f"{path}.windows={self.windows} should be numbers of tokens, 0 for a layer that sees all")
        if len(self.windows) > self.layers:
            raise UsageError(
                f"{path}.windows={self.windows} is longer than {path}.layers={self.layers}; give one entry a layer, or "
                "a pattern to repeat"
            )
        if self.position == "rope":
            self._check_rope(path)
        if self.position == "relative" and not 2 <= self.relative.buckets // 2 < self.relative.max_distance:
            raise UsageError(
                f"{path}.relative.buckets={self.relative.buckets} should be at least 4, and half of them below "
                f"{path}.relative.max_distance={self.relative.max_distance}"
            )

    def _check_rope(self, path: str) -> None:
        if not all(0 <= theta < math.inf for theta in self.rope.theta) or not any(self.rope.theta):
            raise UsageError(f"{path}.rope.theta={self.rope.theta} should be numbers above 0 (0: a layer without)")
        if len(self.rope.theta) not in (1, len(self.windows)):
            raise UsageError(
                f"{path}.rope.theta={self.rope.theta} should have one value, or one for each of the "
                f"{len(self.windows)} entries of {path}.windows"
            )
        if self.head_size % 2:
            raise UsageError(
                f"{path}.head_size={self.head_size} is odd, but rotary positions turn pairs; use an even size"
            )


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """What becomes of tokens before the first layer.

    scale: factor of the embedding, 0 for sqrt(width) (Gemma). norm: whether a norm follows (BLOOM, BERT). types: number
    of token types (BERT), 0 for none. offset: rows of the table of learned positions before that of position 0 (BART:
    2).
    """

    scale: float
    norm: bool
    types: int
    offset: int

    def check(self, path: str) -> None:
        """Raises UsageError for numbers out of range."""
        if not 0 <= self.scale < math.inf:
            raise UsageError(f"{path}.scale={self.scale} should be a number from 0")
        for field in ("types", "offset"):
            if getattr(self, field) < 0:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should not be negative")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The LM head: from hidden states to logits.

    tied: it is the embedding of the tokens. scale: factor of the logits, 0 for width ** -0.5 (T5). bias: one number a
    token. softcap c: logits become c * tanh(logits / c), 0 for none. transform: a dense layer, activation and norm
    before it (BERT's masked-language-model head).
    """

    tied: bool
    scale: float
    bias: bool
    softcap: float
    transform: bool

    def check(self, path: str) -> None:
        """Raises UsageError for numbers out of range."""
        for field in ("scale", "softcap"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be a number from 0")


@dataclasses.dataclass(frozen=True)
class DtypeConfig:
    """Number formats by name (core/dtypes.py). compute "auto": by platform. products: a name in dtypes.PRODUCTS."""

    params: str
    compute: str
    products: str


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The section `model` of a config.

    architecture: a name in STACKS, which says which of `encoder` and `decoder` there are; the other is None.
    vocab_size: tokens; stored rows are rounded up to vocab_multiple and masked. max_length: tokens of a text. width: of
    what passes from layer to layer. scalar_heads: names in SCALAR_HEADS, each of which gives a token one number.
    dropout: share of the embedding's and of each branch's output that is set to zero in training (attention weights are
    never dropped). scan, remat: how the layers are run; what remat may be says layers/remat.py. attention_block:
    queries and keys of a block of the TPU's attention kernels, or fewer where a row does not divide into such blocks;
    nothing on other platforms.
    """

    family: str
    size: str
    architecture: str
    vocab_size: int
    vocab_multiple: int
    max_length: int
    width: int
    embedding: EmbeddingConfig
    encoder: StackConfig | None
    decoder: StackConfig | None
    head: HeadConfig
    scalar_heads: tuple[str, ...]
    init: InitConfig
    dropout: float
    scan: bool
    remat: str
    attention_block: int
    dtype: DtypeConfig

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def stack(self, name: str) -> StackConfig:
        """The encoder or the decoder of an architecture that has it."""
        return self.stacks[name]

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """The stacks that this architecture has, by name."""
        both = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack for name, stack in both.items() if stack is not None}

    def check(self, path: str) -> None:
        """Raises UsageError for names that are in no table and numbers that do not fit together."""
        if tuple(self.stacks) != STACKS[self.architecture]:
            raise UsageError(f"{path}.architecture={self.architecture!r} has {' and '.join(STACKS[self.architecture])}")
        for name in self.scalar_heads:
            if name not in SCALAR_HEADS:
                raise UsageError(f"{path}.scalar_heads: {name!r} is unknown; {nearest(name, SCALAR_HEADS)}")
        remat.parse(self.remat, path=f"{path}.remat")
        for field in ("vocab_size", "vocab_multiple", "max_length", "width"):
            if getattr(self, field) < 1:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be at least 1")
        if self.attention_block < kernels.LANES or self.attention_block % kernels.LANES:
            raise UsageError(f"{path}.attention_block={self.attention_block} should be a multiple of {kernels.LANES}")
        if not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"{path}.dropout={self.dropout} should be at least 0 and below 1")


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
    supplied = merged(family, sizes[size] if size != CUSTOM else {})
    chosen = _without_absent_stacks(section, supplied, path)
    return _fill(chosen, supplied, path, f"size {size!r} of {name}")


def _without_absent_stacks(section: bridge.Values, supplied: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The section with None for each stack that its architecture does not have; refuses fields set there."""
    architecture = str(section.get("architecture") or supplied["architecture"])
    if architecture not in STACKS:
        raise UsageError(f"{path}.architecture={architecture!r} is unknown; {nearest(architecture, STACKS)}")
    chosen: dict[str, Any] = dict(section.items())
    for name in {"encoder", "decoder"} - set(STACKS[architecture]):
        given = next(_given(section.get(name), f"{path}.{name}"), None)
        if given is not None:
            raise UsageError(f"{given} has no effect, since {path}.architecture={architecture!r} has no {name}")
        chosen[name] = None
    return chosen


def _given(node: Any, path: str) -> Any:
    """Yields the path of each field below `node` that is not None."""
    if isinstance(node, Mapping | ConfigDict):
        for key, value in node.items():
            yield from _given(value, f"{path}.{key}")
    elif node is not None:
        yield path


def _fill(section: bridge.Values, supplied: Mapping[str, Any], path: str, source: str) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    values: dict[str, Any] = dict(section.items())
    for key, value in values.items():
        other = supplied.get(key)
        if isinstance(value, Mapping | ConfigDict):
            filled[key] = _fill(value, other if isinstance(other, Mapping) else {}, f"{path}.{key}", source)
        elif value is None and key in ("encoder", "decoder"):
            filled[key] = None  # a stack that this architecture does not have
        elif value is None and other is None:
            raise UsageError(f"{path}.{key} is not given, and {source} supplies none; set it")
        else:
            filled[key] = other if value is None else value
    return filled
