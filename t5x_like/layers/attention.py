"""Attention behind one signature: which path runs is chosen by the platform of the mesh, the result is the same.

It is the mathematics softmax(q k / scale) v under a mask; it is NOT projections, rotary positions or caches (block.py,
kv_cache.py). Kernels are in kernels.py; this file holds the choice and the XLA path that is right everywhere.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K queries a kv head, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers.masks import MaskSpec, allowed


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: MaskSpec,
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped kv heads; the softmax is in float32, the output in q's dtype.

    scale multiplies the logits (usually H ** -0.5); softcap c makes them c * tanh(logits / c) before the mask.
    """
    return attention_over_parts(q_BTNH, [(k_BSKH, v_BSKH, mask)], scale=scale, softcap=softcap)


def attention_over_parts(
    q_BTNH: Float[Array, "B T N H"],
    parts: list[tuple[Array, Array, MaskSpec]],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attention over several (k, v, mask) as if their keys were one row: a cache beside the new keys, no copy made."""
    B, T, N, H = q_BTNH.shape
    K = parts[0][0].shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    weights, values = [], []
    logits = [_logits(q_BTKGH, k, mask, scale=scale, softcap=softcap) for k, _, mask in parts]
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([l.max(axis=-1) for l in logits]), axis=0))
    top = jnp.where(jnp.isfinite(top), top, 0.0)[..., None]  # a query with no key: all logits are -inf
    weights = [jnp.exp(l - top) for l in logits]
    total_BKGT = sum(w.sum(axis=-1) for w in weights)
    values = sum(
        jnp.einsum("BKGTS,BSKH->BTKGH", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, v, _) in zip(weights, parts, strict=True)
    )
    total_BTKG = jnp.where(total_BKGT == 0.0, 1.0, total_BKGT).transpose(0, 3, 1, 2)
    return (values / total_BTKG[..., None]).astype(q_BTNH.dtype).reshape(B, T, N, H)


def _logits(q_BTKGH, k_BSKH, mask: MaskSpec, *, scale: float, softcap: float | None):
    """Masked float32 logits [B, K, G, T, S]."""
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    seen_BTS = allowed(mask, q_length=logits.shape[3], k_length=logits.shape[4])
    if seen_BTS is None:
        return logits
    return jnp.where(seen_BTS[:, None, None, :, :], logits, -jnp.inf)
