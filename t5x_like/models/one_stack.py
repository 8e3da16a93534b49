"""A model of one stack: embedding, layers, and the head that scoring multiplies with.

A decoder is causal and keeps a cache. In an encoder (BERT's kind) every token sees its whole segment; it has none.
NOT here: the interface that the rest of the program sees (model.py), the stack (tower.py), logits and losses
(layers/scoring/).

Legend: B batch, T length, D model, P prefix of rows that branch, J branches of a row, N tokens of a branch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.layers.attention.branches import Branches
from t5x_like.layers.param import empty
from t5x_like.layers.scoring.head import Head
from t5x_like.models.architecture import Output
from t5x_like.models.config import ModelConfig
from t5x_like.models.ends import Ends
from t5x_like.models.tower import Tokens, Tower
from t5x_like.parallel.pipeline import PipelineConfig
from t5x_like.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class OneStack:
    """The architecture "decoder" or "encoder", as the config names it."""

    config: ModelConfig
    rules: Rules
    dtypes: DtypePolicy
    pipeline: PipelineConfig | None

    @property
    def causal(self) -> bool:
        return self.config.architecture == "decoder"

    @property
    def inputs(self) -> tuple[str, ...]:
        of_kind = ("prefix", "branches") if self.causal else ("token_types",)
        return ("inputs", "positions", "segment_ids", *of_kind)

    @functools.cached_property
    def _ends(self) -> Ends:
        return Ends(self.config, self.config.stack(self.config.architecture), self.rules, self.dtypes)

    @functools.cached_property
    def _tower(self) -> Tower:
        stack = self.config.stack(self.config.architecture)
        return Tower(self.config, stack, self.dtypes, self.pipeline, causal=self.causal, cross=False)

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
            self._require_cache()
        given = {name: batch.get(name) for name in self.inputs}
        ids_BT, branches = branched(batch["inputs"], given.get("branches"))
        if branches is not None and cache is not None:
            raise ValueError("rows that branch have no cache")
        x_BTD = self._ends.embed(params, ids_BT, given["positions"], types_BT=given.get("token_types"), key=key)
        tokens = Tokens(
            length=x_BTD.shape[1],
            positions_BT=given["positions"],
            segments_BT=given["segment_ids"],
            prefix_BT=given.get("prefix"),
            branches=branches,
        )
        x_BTD, cache, sums = self._tower.run(params, x_BTD, tokens, cache=cache, fresh_rows_R=fresh_rows_R, key=key)
        return Output(x_BTD, cache, sums)

    def score_input(self, params: Tree, output: Output) -> tuple[Float[Array, "B T D"], Head]:
        return self._ends.score_input(params, output.hidden_BTD)

    def read(self, params: Tree, output: Output, name: str) -> Float[Array, "B T"]:
        return self._ends.read(params, output.hidden_BTD, name)

    def start(self, params: Tree, batch: Mapping[str, Array], *, rows: int, length: int) -> Any:
        del params, batch
        self._require_cache()
        return empty(self._tower.cache_specs(rows, length))

    def cache_specs(self, rows: int, length: int, source_length: int) -> dict[str, Any]:
        del source_length
        self._require_cache()
        return self._tower.cache_specs(rows, length)

    def _require_cache(self) -> None:
        if not self.causal:
            raise UsageError(
                "an encoder alone generates nothing, so it has no cache; take a decoder or an encoder-decoder"
            )


def branched(
    ids_BT: Int[Array, "B P"], branches_BJN: Int[Array, "B J N"] | None
) -> tuple[Int[Array, "B T"], Branches | None]:
    """(the tokens of whole rows, how they branch)."""
    if branches_BJN is None:
        return ids_BT, None
    count = branches_BJN.shape[1]
    behind_BT = branches_BJN.reshape(len(ids_BT), -1)
    return jnp.concatenate([ids_BT, behind_BT], axis=1), Branches(ids_BT.shape[1], count)
