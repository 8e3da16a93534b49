"""What a kind of features is: the arrays of its batches, and a reader that makes them from a token set."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from t5x_like.core.types import ArraySpec
from t5x_like.data.config import DataConfig
from t5x_like.data.read.mixtures import Size
from t5x_like.data.read.truncation import Cut
from t5x_like.data.token_set import TokenSet
from t5x_like.data.tokenizers.vocabularies import Vocabulary

Batch = dict[str, np.ndarray]


class Span(NamedTuple):
    """A document, or a part of it, in a row: it begins at `column` of the row, `token` tokens into the document."""

    document: int
    column: int
    token: int


@dataclasses.dataclass(frozen=True)
class Draw:
    """What random choices within rows are made from: `stream` names seed and component, one epoch a row."""

    stream: str
    epochs: Int[np.ndarray, "n"]


class Reader(Protocol):
    """Rows of one token set. `cut`: what of its examples did not fit; `trained(rows)`: tokens with loss (or classes)
    in the first `rows` rows."""

    cut: Cut

    @property
    def size(self) -> Size: ...

    def trained(self, rows: int) -> int: ...

    def batch(self, rows: Int[np.ndarray, "n"], draw: Draw) -> Batch: ...

    def documents(self, row: int) -> list[Span]: ...


@dataclasses.dataclass(frozen=True)
class Feature:
    """One entry of FEATURES.

    packings: the values of config.data.packing that it knows; encoder: whether it has rows of `encoder_length`,
        None where that is free
    arrays(config): {name: array}; open(token_set, config, vocabulary, stride): stride as in `validation_stride`
    check(config): UsageError for what is wrong beyond the fields that all features share
    """

    packings: tuple[str, ...]
    encoder: bool | None
    arrays: Callable[[DataConfig], dict[str, ArraySpec]]
    open: Callable[[TokenSet, DataConfig, Vocabulary, int], Reader]
    check: Callable[[DataConfig], None]


def per_token(config: DataConfig, names: dict[str, str], length: int) -> dict[str, ArraySpec]:
    """{name: [batch_size, length]} for {name: numpy type}."""
    shape = (config.batch_size, length)
    return {name: ArraySpec(shape, dtype, ("batch", "length")) for name, dtype in names.items()}
