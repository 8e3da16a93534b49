"""An encoder alone: embedding, a stack in which every token sees its whole segment, and the head (BERT's kind).

Legend: B batch, T length, D model.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.layers.scoring.head import Head
from t5x_like.models.architecture import Output
from t5x_like.models.config import ModelConfig
from t5x_like.models.ends import Ends
from t5x_like.models.tower import Tokens, Tower
from t5x_like.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class Encoder:
    config: ModelConfig
    rules: Rules
    dtypes: DtypePolicy

    inputs = ("inputs", "positions", "segment_ids", "token_types")

    @functools.cached_property
    def _ends(self) -> Ends:
        return Ends(self.config, self.config.stack("encoder"), self.rules, self.dtypes)

    @functools.cached_property
    def _tower(self) -> Tower:
        return Tower(self.config, self.config.stack("encoder"), self.dtypes, causal=False, cross=False)

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
        if cache is not None:
            raise _no_cache()
        x_BTD = self._ends.embed(
            params, batch["inputs"], batch.get("positions"), types_BT=batch.get("token_types"), key=key
        )
        tokens = Tokens(
            length=x_BTD.shape[1], positions_BT=batch.get("positions"), segments_BT=batch.get("segment_ids")
        )
        x_BTD, _, sums = self._tower.run(params, x_BTD, tokens, cache=None, key=key)
        return Output(x_BTD, None, sums)

    def score_input(self, params: Tree, output: Output) -> tuple[Float[Array, "B T D"], Head]:
        return self._ends.score_input(params, output.hidden_BTD)

    def start(self, params: Tree, batch: Mapping[str, Array], *, rows: int, length: int) -> Any:
        raise _no_cache()

    def cache_specs(self, rows: int, length: int, source_length: int) -> dict[str, Any]:
        raise _no_cache()


def _no_cache() -> UsageError:
    return UsageError("an encoder alone generates nothing, so it has no cache; take a decoder or an encoder-decoder")
