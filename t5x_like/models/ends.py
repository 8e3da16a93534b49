"""What stands before the first layer and behind the last of any architecture: embedding, LM head and other heads,
dropout.

Not here: the layers (tower.py), logits and losses (layers/scoring/).

Legend: B batch, T length, D model, V vocab (padded).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.core.types import Tree
from t5x_like.layers.dropout import dropout
from t5x_like.layers.embedding import Embedding
from t5x_like.layers.initialization import Initialization
from t5x_like.layers.mlp import ACTIVATIONS, add_bias
from t5x_like.layers.norms import NORMS
from t5x_like.layers.param import ZEROS, declare, normal, param
from t5x_like.layers.scoring.head import Head
from t5x_like.layers.weights import einsum, value
from t5x_like.models.config import ModelConfig, StackConfig
from t5x_like.parallel.rules import Rules
from t5x_like.parallel.sharding import constrain


class HeadTransform(nnx.Module):
    """What BERT's masked-language-model head does before the product: dense, activation, norm (arXiv 1810.04805)."""

    def __init__(self, width: int, stack: StackConfig, init: Initialization):
        self.dense = param((width, width), axes=("embed", "mlp"), init=init.weight(width))
        self.dense_bias = param((width,), axes=("norm",), init=ZEROS)
        self.norm = NORMS[stack.norm](width, epsilon=stack.norm_epsilon)
        self.activation = stack.activation

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y_BTD = add_bias(einsum("BTD,DE->BTE", x_BTD, self.dense), self.dense_bias)
        return self.norm(ACTIVATIONS[self.activation](y_BTD))


class HeadWeights(nnx.Module):
    """The own parameters of the LM head (`lm_head` in transformers). `weight` is stored like the embedding, [V, D], so
    that there is one kind of head."""

    def __init__(self, config: ModelConfig, stack: StackConfig, init: Initialization):
        if not config.head.tied:
            shape = (config.padded_vocab, config.width)
            self.weight = param(shape, axes=("vocab", "embed"), init=init.weight(config.width))
        if config.head.bias:
            self.bias = param((config.padded_vocab,), axes=("vocab",), init=ZEROS)
        if config.head.transform:
            self.transform = HeadTransform(config.width, stack, init)


class ScalarHead(nnx.Module):
    """One number a token: a product with the hidden state, in float32 (`score` in transformers). The standard deviation
    of its first weights is 1 / sqrt(D + 1), as in arXiv 1909.08593."""

    def __init__(self, width: int):
        self.weight = param((width,), axes=("norm",), init=normal((width + 1) ** -0.5))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), value(self.weight).astype(jnp.float32))


class ScalarHeads(nnx.Module):
    def __init__(self, names: tuple[str, ...], width: int):
        for name in names:
            setattr(self, name, ScalarHead(width))


class EndModules(nnx.Module):
    def __init__(self, config: ModelConfig, stack: StackConfig):
        init = Initialization(config.init, layers=stack.layers)
        self.embed = Embedding(
            vocab=config.padded_vocab,
            embed=config.width,
            positions=config.max_length if stack.position == "learned" else 0,
            init=init.embedding(),
            offset=config.embedding.offset,
            types=config.embedding.types,
            scale=config.embedding.scale or math.sqrt(config.width),
            norm=stack.norm if config.embedding.norm else "",
            norm_epsilon=stack.norm_epsilon,
        )
        if not config.head.tied or config.head.bias or config.head.transform:
            self.head = HeadWeights(config, stack, init)
        if config.scalar_heads:
            self.heads = ScalarHeads(config.scalar_heads, config.width)


@dataclasses.dataclass(frozen=True)
class Ends:
    """Embedding and head of a model whose scored stack is `stack`, as functions of the whole tree of parameters."""

    config: ModelConfig
    stack: StackConfig
    rules: Rules
    dtypes: DtypePolicy

    @functools.cached_property
    def _declared(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        return declare(lambda: EndModules(self.config, self.stack), dtype=self.dtypes.params)

    def specs(self) -> dict[str, Any]:
        """`embed`; where the LM head has parameters of its own, `head`; where there are others, `heads`."""
        return self._declared[1]

    def embed(
        self,
        params: Tree,
        ids_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None,
        *,
        types_BT: Int[Array, "B T"] | None = None,
        key: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """What the first layer reads. types_BT: token types, None for type 0. key: dropout."""
        with jax.named_scope("embed"):
            x_BTD = self._modules(params).embed(ids_BT, positions_BT, dtype=self.dtypes.compute, types_BT=types_BT)
            return constrain(dropout(x_BTD, self.config.dropout, key, "embed"), "batch", "length", "act_embed")

    def score_input(self, params: Tree, hidden_BTD: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Head]:
        """(hidden states, head): what the scorer multiplies with what."""
        head = self.config.head
        modules = self._modules(params)
        if head.transform:
            hidden_BTD = modules.head.transform(hidden_BTD)
        scale = head.scale or self.config.width**-0.5
        return hidden_BTD, Head(
            weight=params["embed"]["tokens"] if head.tied else params["head"]["weight"],
            bias=params["head"]["bias"] if head.bias else None,
            vocab_size=self.config.vocab_size,
            scale=None if scale == 1.0 else scale,
            softcap=head.softcap or None,
            rules=self.rules,
        )

    def read(self, params: Tree, hidden_BTD: Float[Array, "B T D"], name: str) -> Float[Array, "B T"]:
        """The number of each token that the head of this name gives."""
        return getattr(self._modules(params).heads, name)(hidden_BTD)

    def _modules(self, params: Tree) -> Any:
        # A module for the span of one call: its parameters are the arrays at hand.
        graphdef, specs = self._declared
        return nnx.merge(graphdef, {name: params[name] for name in specs})
