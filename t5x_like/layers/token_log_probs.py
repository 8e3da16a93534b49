"""The one scorer: log-probabilities of given tokens from hidden states and a head, without full float32 logits.

`token_log_probs` serves every objective and evaluation, because its cotangents are per token. It is NOT a loss: weights,
label smoothing, z-loss and sums belong to objectives. `logits` is for decoding a few positions.

Legend: B batch, T length, D model, V vocab (padded).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits. Columns at and past vocab_size are padding: never chosen, never summed."""

    weight: Any  # [V, D] leaf, axes (vocab, embed); the embedding itself when tied
    bias: Any  # [V] leaf or None
    vocab_size: int = dataclasses.field(metadata={"static": True})  # true size, unpadded
    softcap: float | None = dataclasses.field(metadata={"static": True})


def logits(x_BTD: Float[Array, "B T D"], head: Head) -> Float[Array, "B T V"]:
    """Float32 logits, -inf in the padding of the vocabulary."""
    values = jnp.einsum("BTD,VD->BTV", x_BTD, head.weight.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    if head.bias is not None:
        values += head.bias.astype(jnp.float32)[None, None, :]
    if head.softcap is not None:
        values = head.softcap * jnp.tanh(values / head.softcap)
    real = jnp.arange(values.shape[-1]) < head.vocab_size
    return jnp.where(real[None, None, :], values, -jnp.inf)


def token_log_probs(
    x_BTD: Float[Array, "B T D"], head: Head, targets_BT: Int[Array, "B T"], *, chunk: int | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probability of each target, log of the normaliser), float32."""
    values = logits(x_BTD, head)
    logz = jax.nn.logsumexp(values, axis=-1)
    return jnp.take_along_axis(values, targets_BT[..., None], axis=-1)[..., 0] - logz, logz


def token_predictions(x_BTD: Float[Array, "B T D"], head: Head) -> Int[Array, "B T"]:
    """The most probable token at each position (the lowest id among equals)."""
    return jnp.argmax(logits(x_BTD, head), axis=-1).astype(jnp.int32)
