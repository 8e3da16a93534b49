"""What a parameter is, and the letters that name dimensions. No arrays are made here.

Dimension legend, used as suffixes of names inside bodies (`x_BTD`) wherever arrays are handled:
B batch, T query length, S key length, D model width (embed), N query heads, K key-value heads, H head size,
F mlp width, V vocabulary, L layers, E experts.

A leaf of a parameter tree is an array or an object with `shape`, `axes` and `kind` that is registered as a pytree
(a quantized or a low-rank weight); whatever walks trees of parameters stops at such a leaf.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

Tree: TypeAlias = Mapping[str, Any]  # nested dicts with string keys; anything that is no dict is a leaf
Axes: TypeAlias = tuple[str | None, ...]  # one logical axis name for each dim; None is never sharded


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it exists: `dtype` is its storage type by name, `init` names its initializer."""

    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    init: str

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def kind(self) -> str:
        return "array"


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a batch before it exists: `dtype` by name, one logical axis name for each dim, "batch" first.

    Whatever belongs together (the texts of a pair, the candidates of a ranking) stands in one row.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: Axes

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        if self.axes[:1] != ("batch",):
            raise ValueError(f"axes {self.axes} should begin with 'batch': batches are read and divided by rows")


@runtime_checkable
class RandomLeaf(Protocol):
    """A leaf that draws random numbers in training (dropout). with_key: the leaf that does so, for one call."""

    def with_key(self, key: Any, /) -> Any: ...


@runtime_checkable
class Leaf(Protocol):
    """A weight that is no plain array: knows its logical shape, axes and kind, and its contractions.

    contract, rows and ragged are what `einsum`, `take` and `ragged` of layers/weights.py do with an array, where the
    forms of equations, types and gradients are said. dense: the whole as one array.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def axes(self) -> Axes: ...
    @property
    def kind(self) -> str: ...
    def contract(self, equation: str, x: Any, /) -> Any: ...
    def rows(self, ids: Any, dtype: Any, /) -> Any: ...
    def ragged(self, x: Any, sizes: Any, /) -> Any: ...
    def dense(self, dtype: Any, /) -> Any: ...
