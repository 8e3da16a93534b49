"""The model as the rest of the program sees it: functions over a plain nested dict of parameters.

A `Model` is a frozen value (config, rules, number formats) that holds no array. It is NOT a module: nothing above this
file knows NNX. `apply` runs under jit.

Legend: B batch, R rows of a prefill, T length, S source length, D model, V vocab (padded).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from t5x_like.core import tree
from t5x_like.core.dtypes import COMPUTE, INT8, DtypePolicy
from t5x_like.core.errors import UserError
from t5x_like.core.types import Tree
from t5x_like.layers import int8
from t5x_like.layers.param import empty, fold, initialize
from t5x_like.layers.platform import float32_products
from t5x_like.layers.scoring.head import Head
from t5x_like.layers.weights import keyed
from t5x_like.models import flops
from t5x_like.models.architecture import Architecture, Output
from t5x_like.models.config import ModelConfig
from t5x_like.models.encoder_decoder import EncoderDecoder
from t5x_like.models.one_stack import OneStack
from t5x_like.parallel.pipeline import PipelineConfig
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import use_rules

ARCHITECTURES: dict[str, type[Architecture]] = {
    "decoder": OneStack,
    "encoder": OneStack,
    "encoder_decoder": EncoderDecoder,
}


@dataclasses.dataclass(frozen=True)
class Model:
    config: ModelConfig
    rules: Rules
    dtypes: DtypePolicy
    pipeline: PipelineConfig | None = None  # how it runs in stages, where the mesh has them; None for without

    @functools.cached_property
    def _architecture(self) -> Architecture:
        return ARCHITECTURES[self.config.architecture](self.config, self.rules, self.dtypes, self.pipeline)

    @functools.cached_property
    def _specs(self) -> dict[str, Any]:
        return self._architecture.specs()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The batch arrays that `apply` reads where they are given; of these only token ids must be."""
        return self._architecture.inputs

    def specs(self) -> dict[str, Any]:
        """The nested dict of ParamSpec; nothing is allocated."""
        return self._specs

    def init(self, key: jax.Array) -> dict[str, Any]:
        """First parameters. Pure: jitted with `out_shardings` it draws each shard in place, with the same values."""
        return initialize(self._specs, key)

    def apply(
        self, params: Tree, batch: Mapping[str, Array], *, cache: Any = None, key: jax.Array | None = None
    ) -> Output:
        """Hidden states of a batch: `inputs` [B, T] and, where given, `positions` and `segment_ids` (0 is padding).

        Absent positions are 0..T-1, absent segments are one. A decoder also reads `branches` [B, J, N]: continuations
        of its rows, of which none sees another. Rows then are padded on the left, and positions, segments and hidden
        states are those of [B, T + J N], row and branches one behind the other. An encoder-decoder also reads
        `encoder_inputs` [B, S] and, where given, `encoder_positions` and `encoder_segment_ids`: a segment of the
        decoder sees that of the encoder. With a cache, which needs positions, the tokens also see those of earlier
        calls, and the encoder is not run.
        key: dropout; None turns it off.
        """
        return self._run(params, batch, cache=cache, fresh_rows_R=None, key=key)

    def prefill(self, params: Tree, cache: Any, batch: Mapping[str, Array], rows_R: Int[Array, " R"]) -> Output:
        """Hidden states of whole texts, which become the content of these rows of a cache; other rows stay.

        Texts [R, T] begin at position 0 and are padded on the right, where `segment_ids` is 0 (else 1). They attend to
        themselves alone, by index, as in training: the same kernels run, and memory grows with T, not its square.
        """
        return self._run(params, batch, cache=cache, fresh_rows_R=rows_R, key=None)

    def _run(
        self,
        params: Tree,
        batch: Mapping[str, Array],
        *,
        cache: Any,
        fresh_rows_R: Array | None,
        key: jax.Array | None,
    ) -> Output:
        _check_tree(params, self._specs)
        self._check_lengths(batch)
        if cache is None and self.dtypes.products != COMPUTE:
            params = int8.in_products(params, self._specs, backward=self.dtypes.products == INT8)
        params = params if key is None else keyed(params, fold(key, "weights"))
        with use_rules(self.rules), float32_products(self.dtypes.compute):
            return self._architecture.apply(params, batch, cache=cache, fresh_rows_R=fresh_rows_R, key=key)

    def score_input(self, params: Tree, output: Output) -> tuple[Float[Array, "B T D"], Head]:
        """(hidden states, head): what the scorer multiplies with what to get logits."""
        with use_rules(self.rules), float32_products(self.dtypes.compute):
            return self._architecture.score_input(params, output)

    def read(self, params: Tree, output: Output, name: str) -> Float[Array, "B T"]:
        """What the head of this name (config.model.scalar_heads) says of each token, in float32."""
        with use_rules(self.rules), float32_products(self.dtypes.compute):
            return self._architecture.read(params, output, name)

    def start(self, params: Tree, batch: Mapping[str, Array], *, rows: int, length: int) -> Any:
        """The cache of `rows` texts of up to `length` tokens before the first of them. An encoder-decoder runs its
        encoder on `encoder_inputs` of the batch."""
        self._check_lengths(batch)
        with use_rules(self.rules), float32_products(self.dtypes.compute):
            return self._architecture.start(params, batch, rows=rows, length=length)

    def cache_specs(self, rows: int, length: int, source_length: int = 0) -> dict[str, Any]:
        """A cache of specs, for `rows` texts of up to `length` tokens, prompt included, and of sources up to
        `source_length`; map over it by `jax.tree`."""
        return self._architecture.cache_specs(rows, length, source_length)

    def init_cache(self, rows: int, length: int, source_length: int = 0) -> dict[str, Any]:
        """An empty cache."""
        return empty(self.cache_specs(rows, length, source_length))

    def parameter_count(self) -> int:
        """Numbers that are learned: what only pads the vocabulary is left out."""
        return sum(
            math.prod(
                self.config.vocab_size if axis == "vocab" else dim
                for axis, dim in zip(spec.axes, spec.shape, strict=True)
            )
            for _, spec in tree.leaves(self._specs)
        )

    def flops_per_token(self, length: int, source_length: int = 0) -> flops.FlopsPerToken:
        """Floating-point operations per token in rows of `length`; the convention is written there."""
        return flops.per_token(self.config, length=length, source_length=source_length)

    def _check_lengths(self, batch: Mapping[str, Array]) -> None:
        for name in ("inputs", "encoder_inputs"):
            length = batch[name].shape[1] if name in batch else 0
            if name == "inputs" and "branches" in batch:
                length += batch["branches"].shape[2]
            if length > self.config.max_length:
                raise UserError(
                    f"a row of {length} tokens is longer than config.model.max_length={self.config.max_length}; "
                    "shorten config.data.length or the text"
                )


def _check_tree(params: Tree, specs: Tree) -> None:
    """`nnx.merge` matches leaves by sorted position, not by name, and takes any shape; so both are compared here."""
    found, expected = tree.flatten(params), tree.flatten(specs)
    for path in expected.keys() - found.keys():
        raise ValueError(f"parameter {path!r} is missing; the tree holds {sorted(found.keys() - expected.keys())[:5]}")
    for path in found.keys() - expected.keys():
        raise ValueError(f"parameter {path!r} is unknown to this model")
    for path, spec in expected.items():
        if tuple(found[path].shape) != spec.shape:
            raise ValueError(f"parameter {path!r} has shape {tuple(found[path].shape)}; expected {spec.shape}")
