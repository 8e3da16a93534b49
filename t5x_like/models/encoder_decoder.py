"""An encoder-decoder: one embedding, an encoder that sees its whole segment, and a causal decoder that attends to it.

While it decodes, the encoder's output is needed only as the keys and values of each decoder layer; `start` computes
them once and the cache holds them.

Legend: B batch, T decoder length, S encoder length, D model.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import Tree
from t5x_like.layers.block import Memory
from t5x_like.layers.param import empty, fold
from t5x_like.layers.scoring.head import Head
from t5x_like.models.architecture import Output
from t5x_like.models.config import ModelConfig
from t5x_like.models.ends import Ends
from t5x_like.models.tower import Tokens, Tower
from t5x_like.parallel.pipeline import PipelineConfig
from t5x_like.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class EncoderDecoder:
    config: ModelConfig
    rules: Rules
    dtypes: DtypePolicy
    pipeline: PipelineConfig | None

    inputs = (
        *("inputs", "positions", "segment_ids"),
        *("encoder_inputs", "encoder_positions", "encoder_segment_ids"),
    )

    @functools.cached_property
    def _ends(self) -> Ends:
        return Ends(self.config, self.config.stack("decoder"), self.rules, self.dtypes)

    @functools.cached_property
    def _encoder(self) -> Tower:
        return Tower(self.config, self.config.stack("encoder"), self.dtypes, self.pipeline, causal=False, cross=False)

    @functools.cached_property
    def _decoder(self) -> Tower:
        return Tower(self.config, self.config.stack("decoder"), self.dtypes, self.pipeline, causal=True, cross=True)

    def specs(self) -> dict[str, Any]:
        return {**self._ends.specs(), "encoder": self._encoder.specs(), "decoder": self._decoder.specs()}

    def apply(
        self,
        params: Tree,
        batch: Mapping[str, Array],
        *,
        cache: Any,
        fresh_rows_R: Int[Array, " R"] | None,
        key: jax.Array | None,
    ) -> Output:
        memory, sums = None, {}
        if cache is None:
            memory, sums = self._encode(params, batch, key=key)
        with jax.named_scope("decoder"):
            decoder_key = None if key is None else fold(key, "decoder")
            x_BTD = self._ends.embed(params, batch["inputs"], batch.get("positions"), key=decoder_key)
            tokens = Tokens(
                length=x_BTD.shape[1],
                positions_BT=batch.get("positions"),
                segments_BT=batch.get("segment_ids"),
                memory=memory,
            )
            x_BTD, cache, more = self._decoder.run(
                params["decoder"], x_BTD, tokens, cache=cache, fresh_rows_R=fresh_rows_R, key=decoder_key
            )
        return Output(x_BTD, cache, sums | more)

    def score_input(self, params: Tree, output: Output) -> tuple[Float[Array, "B T D"], Head]:
        return self._ends.score_input(params, output.hidden_BTD)

    def read(self, params: Tree, output: Output, name: str) -> Float[Array, "B T"]:
        return self._ends.read(params, output.hidden_BTD, name)

    def start(self, params: Tree, batch: Mapping[str, Array], *, rows: int, length: int) -> Any:
        """Runs the encoder on `encoder_inputs`; the cache holds the keys and values of cross attention."""
        alone = dataclasses.replace(self, pipeline=None)  # as all decoding; prompts may be of any number
        memory, _ = alone._encode(params, batch, key=None)
        return empty(self._decoder.cache_specs(rows, length)) | self._decoder.cross_cache(params["decoder"], memory)

    def cache_specs(self, rows: int, length: int, source_length: int) -> dict[str, Any]:
        return self._decoder.cache_specs(rows, length) | self._decoder.cross_specs(rows, source_length)

    def _encode(
        self, params: Tree, batch: Mapping[str, Array], *, key: jax.Array | None
    ) -> tuple[Memory, dict[str, Array]]:
        with jax.named_scope("encoder"):
            encoder_key = None if key is None else fold(key, "encoder")
            positions_BS, segments_BS = batch.get("encoder_positions"), batch.get("encoder_segment_ids")
            x_BSD = self._ends.embed(params, batch["encoder_inputs"], positions_BS, key=encoder_key)
            tokens = Tokens(length=x_BSD.shape[1], positions_BT=positions_BS, segments_BT=segments_BS)
            x_BSD, _, sums = self._encoder.run(params["encoder"], x_BSD, tokens, cache=None, key=encoder_key)
        return Memory(hidden_BSD=x_BSD, segments_BS=segments_BS), sums
