"""Attention over the whole matrix of logits: the path that is right for any mask and any lengths, on any platform.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K queries a kv head, H head size.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers.attention import biases
from t5x_like.layers.attention.biases import Bias
from t5x_like.layers.attention.masks import MASKED, NOTHING_SEEN, MaskSpec, allowed, at_least_something


def attention_over_parts(
    q_BTNH: Float[Array, "B T N H"],
    parts: Sequence[tuple[Array, Array, MaskSpec]],
    *,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Attention over several (k, v, mask) as if their keys were one row: a cache beside the new keys, no copy made.

    Materialises the logits [B, N, T, S].
    """
    B, T, N, H = q_BTNH.shape
    K = parts[0][0].shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)
    logits = [_logits(q_BTKGH, k_BSKH, mask, softcap=softcap, bias=bias) for k_BSKH, _, mask in parts]
    top_BKGT = functools.reduce(jnp.maximum, [part.max(axis=-1) for part in logits])
    top_BKGT = jax.lax.stop_gradient(jnp.maximum(top_BKGT, NOTHING_SEEN))
    weights = [jnp.exp(part - top_BKGT[..., None]) for part in logits]
    total_BKGT: Any = sum(part.sum(axis=-1) for part in weights)
    total_BKGT = at_least_something(total_BKGT)
    out_BTKGH = sum(
        jnp.einsum("BKGTS,BSKH->BTKGH", part.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
        for part, (_, v_BSKH, _) in zip(weights, parts, strict=True)
    )
    out_BTKGH = out_BTKGH / total_BKGT.transpose(0, 3, 1, 2)[..., None]
    return out_BTKGH.astype(q_BTNH.dtype).reshape(B, T, N, H)


def _logits(q_BTKGH, k_BSKH, mask: MaskSpec, *, softcap: float | None, bias: Bias | None):
    """Masked float32 logits [B, K, G, T, S] of scaled queries."""
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        bias_bNTS = _bias_matrix(bias, mask, q_length=logits.shape[3], k_length=logits.shape[4])
        bias_bKGTS = bias_bNTS.reshape(bias_bNTS.shape[0], *logits.shape[1:])
        logits = logits + jnp.broadcast_to(bias_bKGTS, logits.shape)
    seen_BTS = allowed(mask, q_length=logits.shape[3], k_length=logits.shape[4])
    return logits if seen_BTS is None else jnp.where(seen_BTS[:, None, None, :, :], logits, MASKED)


def _bias_matrix(bias: Bias, mask: MaskSpec, *, q_length: int, k_length: int) -> jax.Array:
    if mask.by_index:
        return biases.by_index(bias, q_length, k_length)
    q_positions, k_positions = mask.q_positions_BT, mask.k_positions_BS
    q_positions = jnp.arange(q_length, dtype=jnp.int32)[None, :] if q_positions is None else q_positions
    k_positions = jnp.arange(k_length, dtype=jnp.int32)[None, :] if k_positions is None else k_positions
    return bias.matrix(q_positions, k_positions)
