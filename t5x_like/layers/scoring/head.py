"""The LM head as a value, and `logits` for decoding a few positions. Scores of many tokens: token_scores.py.

Legend: B batch, T length, D model, V vocab (padded).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers import weights
from t5x_like.layers.platform import matmul_precision
from t5x_like.parallel.rules import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states x into logits: softcap(scale * x W^T + bias), softcap(y) = cap * tanh(y / cap).

    Columns at and past vocab_size are padding: never chosen, never summed. rules: the table that the model was built
    with, which says how the weight lies on the mesh. scale: T5 with tied embeddings has D ** -0.5.
    """

    weight: Any  # [V, D] leaf, axes (vocab, embed); the embedding itself when tied
    bias: Any  # [V] leaf, axes (vocab,), or None
    vocab_size: int = dataclasses.field(metadata={"static": True})  # true size, unpadded
    softcap: float | None = dataclasses.field(metadata={"static": True})
    rules: Rules | None = dataclasses.field(metadata={"static": True}, default=None)
    scale: float | None = dataclasses.field(metadata={"static": True}, default=None)

    def arrays(self, dtype: Any) -> tuple[Any, Any]:
        """Weight and bias as arrays: a weight that is no array is written out in `dtype`."""
        return weights.dense(self.weight, dtype), None if self.bias is None else weights.value(self.bias)


def logits(x_BTD: Float[Array, "B T D"], head: Head) -> Float[Array, "B T V"]:
    """Float32 logits, -inf in the padding of the vocabulary. Materialises [B, T, V]: for few positions only."""
    with jax.named_scope("head"):
        logits_BTV = weights.against_rows(x_BTD, head.weight)
        bias_V = None if head.bias is None else weights.value(head.bias)
        if logits_BTV is None:
            weight_VD = weights.dense(head.weight, x_BTD.dtype)
            logits_BTV = jnp.einsum(
                "BTD,VD->BTV",
                x_BTD,
                weight_VD.astype(x_BTD.dtype),
                precision=matmul_precision(x_BTD.dtype),
                preferred_element_type=jnp.float32,
            )
        logits_BTV = logits_BTV if head.scale is None else head.scale * logits_BTV
        logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V.astype(jnp.float32)[None, None, :]
        real_V = jnp.arange(logits_BTV.shape[-1]) < head.vocab_size
        return jnp.where(real_V[None, None, :], capped(logits_BTV, head.softcap), -jnp.inf)


def capped(values: jax.Array, softcap: float | None) -> jax.Array:
    return values if softcap is None else softcap * jnp.tanh(values / softcap)
