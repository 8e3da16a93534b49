"""What every architecture can do, whatever stacks it has: the contract behind `Model`, and what a forward pass gives.

Not here: the architectures (one_stack.py, encoder_decoder.py) and their table (model.py).

Legend: B batch, T length, S source length, D model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import Tree
from t5x_like.layers.scoring.head import Head
from t5x_like.models.config import ModelConfig
from t5x_like.parallel.pipeline import PipelineConfig
from t5x_like.parallel.rules import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """hidden_BTD: after the final norm, in the compute type. cache: with this call's tokens, or None. sums: what
    objectives need besides (a balance term of experts), by name."""

    hidden_BTD: Float[Array, "B T D"]
    cache: Any
    sums: dict[str, Array]


class Architecture(Protocol):
    """Functions of a tree of parameters; a value without arrays. The methods of `Model` of the same names say more."""

    def __init__(self, config: ModelConfig, rules: Rules, dtypes: DtypePolicy, pipeline: PipelineConfig | None): ...

    @property
    def inputs(self) -> tuple[str, ...]:
        """The batch arrays that `apply` reads where they are given; of these only token ids must be."""
        ...

    def specs(self) -> dict[str, Any]: ...

    def apply(
        self,
        params: Tree,
        batch: Mapping[str, Array],
        *,
        cache: Any,
        fresh_rows_R: Int[Array, " R"] | None,
        key: jax.Array | None,
    ) -> Output: ...

    def score_input(self, params: Tree, output: Output) -> tuple[Float[Array, "B T D"], Head]: ...

    def read(self, params: Tree, output: Output, name: str) -> Float[Array, "B T"]: ...

    def start(self, params: Tree, batch: Mapping[str, Array], *, rows: int, length: int) -> Any: ...

    def cache_specs(self, rows: int, length: int, source_length: int) -> dict[str, Any]: ...
