"""Attention behind one signature: which path runs is chosen by the platform of the mesh, the result is the same.

It is the mathematics softmax(scale q k) v under a mask; it is NOT projections, rotary positions or caches (block.py,
kv_cache.py). The kernels of accelerators are in kernels.py, the path that is fast on a CPU in blockwise.py; this file
holds the choice and the path that is right everywhere.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K queries a kv head, H head size.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers import biases, blockwise, kernels
from t5x_like.layers.biases import Bias
from t5x_like.layers.masks import MASKED, NOTHING_SEEN, MaskSpec, allowed, at_least_something
from t5x_like.layers.platform import compute_capability, platform
from t5x_like.parallel.sharding import constrain


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: MaskSpec,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped kv heads; the softmax is in float32, the output in q's dtype.

    scale multiplies the logits (usually H ** -0.5); softcap c makes them c * tanh(logits / c); then the bias is added,
    then masked. Without positions in the mask, those of the bias are indices.
    """
    target, capability = platform(), compute_capability()
    name, _ = attention_path(
        q_BTNH,
        k_BSKH,
        mask,
        softcap=softcap is not None,
        bias=bias is not None,
        platform=target,
        compute_capability=capability,
    )
    if name == "splash":
        return kernels.splash(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap)
    if name == "cudnn":
        return kernels.cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, bias=bias)
    if name == "blockwise":
        bias_1NTS = None if bias is None else biases.by_index(bias, q_BTNH.shape[1], k_BSKH.shape[1])
        return blockwise.blockwise(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, bias_bNTS=bias_1NTS)
    # Where the sequence is split every device needs the keys of whole rows.
    k_BSKH, v_BSKH = (constrain(x, "batch", "kv_length", "act_kv_heads", "head") for x in (k_BSKH, v_BSKH))
    return attention_over_parts(q_BTNH, [(k_BSKH, v_BSKH, mask)], scale=scale, softcap=softcap, bias=bias)


def attention_path(
    q_BTNH: Any,
    k_BSKH: Any,
    mask: MaskSpec,
    *,
    softcap: bool,
    bias: bool,
    platform: str,
    compute_capability: float | None,
) -> tuple[str, str]:
    """(the path that `attention` takes, why): "splash", "cudnn", "blockwise" or "materialised".

    q_BTNH, k_BSKH: arrays, or jax.ShapeDtypeStruct; of the mask only what is static counts, and which arrays it has.
    Lengths are judged as the mesh and the rules in context split them, so call it where `attention` would be called.
    compute_capability: of an NVIDIA GPU, None if unknown.

    >>> q, k = (jax.ShapeDtypeStruct((1, 4100, n, 128), jnp.bfloat16) for n in (8, 2))
    >>> mask = MaskSpec(causal=True, window=jnp.int32(64))
    >>> attention_path(q, k, mask, softcap=False, bias=False, platform="tpu", compute_capability=None)
    ('materialised', 'no splash: the window is traced; not blockwise: the window is traced')
    """
    reasons = []
    if platform == "tpu":
        why_not = kernels.why_not_splash(q_BTNH, k_BSKH, mask, bias=bias)
        if not why_not:
            return "splash", "the TPU's flash attention kernel"
        reasons.append(f"no splash: {why_not}")
    if platform == "gpu":
        why_not = kernels.why_not_cudnn(
            q_BTNH, k_BSKH, mask, softcap=softcap, bias=bias, compute_capability=compute_capability
        )
        if not why_not:
            blocks = kernels.cudnn_blocks(q_BTNH, k_BSKH, mask)
            reason = "cuDNN's flash attention kernel"
            return (
                "cudnn",
                reason if blocks == 1 else f"{reason}, its mask a matrix for each of {blocks} blocks of queries",
            )
        reasons.append(f"no cuDNN: {why_not}")
    why_not = blockwise.why_not(q_BTNH, k_BSKH, mask, softcap=softcap)
    if not why_not:
        return "blockwise", "; ".join(reasons) or "blocks of queries, each with the keys that it may see"
    return "materialised", "; ".join([*reasons, f"not blockwise: {why_not}"])


# Any mask, any lengths.


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
