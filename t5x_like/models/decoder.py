"""A decoder: embedding, a causal stack, and the head that scoring multiplies with.

NOT here: the interface that the rest of the program sees (model.py), the stack (tower.py), logits and losses
(layers/scoring/).

Legend: B batch, T length, D model.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import Tree
from t5x_like.layers.param import empty
from t5x_like.layers.scoring.head import Head
from t5x_like.models.architecture import Output
from t5x_like.models.config import ModelConfig
from t5x_like.models.ends import Ends
from t5x_like.models.tower import Tokens, Tower
from t5x_like.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class Decoder:
    config: ModelConfig
    rules: Rules
    dtypes: DtypePolicy

    inputs = ("inputs", "positions", "segment_ids", "prefix")

    @functools.cached_property
    def _ends(self) -> Ends:
        return Ends(self.config, self.config.stack("decoder"), self.rules, self.dtypes)

    @functools.cached_property
    def _tower(self) -> Tower:
        return Tower(self.config, self.config.stack("decoder"), self.dtypes, causal=True, cross=False)

    def specs(self) -> dict[str, Any]:
        return {**self._ends.specs(), **self._tower.specs()}

    def apply(
        self,
        params: Tree,
        batch: Mapping[str, Array],
        *,
        cache: Any,
        fresh_rows_R: Int[Array, " R"] | None,
        key: jax.Array | None,
    ) -> Output:
        x_BTD = self._ends.embed(params, batch["inputs"], batch.get("positions"), key=key)
        tokens = Tokens(
            length=x_BTD.shape[1],
            positions_BT=batch.get("positions"),
            segments_BT=batch.get("segment_ids"),
            prefix_BT=batch.get("prefix"),
        )
        x_BTD, cache, sums = self._tower.run(params, x_BTD, tokens, cache=cache, fresh_rows_R=fresh_rows_R, key=key)
        return Output(x_BTD, cache, sums)

    def score_input(self, params: Tree, output: Output) -> tuple[Float[Array, "B T D"], Head]:
        return self._ends.score_input(params, output.hidden_BTD)

    def start(self, params: Tree, batch: Mapping[str, Array], *, rows: int, length: int) -> Any:
        del params, batch
        return empty(self._tower.cache_specs(rows, length))

    def cache_specs(self, rows: int, length: int, source_length: int) -> dict[str, Any]:
        del source_length
        return self._tower.cache_specs(rows, length)
