"""Attention behind one signature: which path runs is chosen by the platform of the mesh, the result is the same.

It is the mathematics softmax(scale q k) v under a mask; it is NOT projections, rotary positions or caches (block.py,
kv_cache.py). The kernels of accelerators are in kernels.py; this file holds the choice, the path that is right
everywhere, and the one that is fast on a CPU.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K queries a kv head, H head size.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float

from t5x_like.layers import kernels
from t5x_like.layers.masks import MASKED, MaskSpec, allowed
from t5x_like.layers.platform import platform
from t5x_like.parallel.sharding import constrain, shards

# The highest logit of a query that sees no key: so far above MASKED that exp of their difference is 0.
NOTHING_SEEN = -1e29
# Queries of one block of the blockwise path. Of a causal row of n blocks (n + 1) / 2n is computed: 62% of 512 tokens in
# blocks of 128. Smaller blocks give matrix products that a CPU does less well, more of them a longer compilation.
BLOCK, MAX_BLOCKS = 128, 16
# Weights of one layer up to this size, a device, are kept for the backward pass of the blockwise path, which spares a
# tenth of its time; larger ones are computed again.
KEEP_BYTES = 64 * 2**20


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
    target = platform()
    if target == "tpu" and kernels.splash_fits(q_BTNH, k_BSKH, mask):
        return kernels.splash(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap)
    if target == "gpu" and kernels.cudnn_fits(q_BTNH, k_BSKH, softcap=softcap):
        return kernels.cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale)
    if _is_blockwise(mask, q_BTNH, k_BSKH, softcap=softcap):
        return _blockwise(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale)
    # Where the sequence is split every device needs the keys of whole rows.
    k_BSKH, v_BSKH = (constrain(x, "batch", "kv_length", "act_kv_heads", "head") for x in (k_BSKH, v_BSKH))
    return attention_over_parts(q_BTNH, [(k_BSKH, v_BSKH, mask)], scale=scale, softcap=softcap)


# Any mask, any lengths.


def attention_over_parts(
    q_BTNH: Float[Array, "B T N H"],
    parts: Sequence[tuple[Array, Array, MaskSpec]],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attention over several (k, v, mask) as if their keys were one row: a cache beside the new keys, no copy made.

    Materialises the logits [B, N, T, S].
    """
    B, T, N, H = q_BTNH.shape
    K = parts[0][0].shape[2]
    q_BTKGH = (q_BTNH * scale).reshape(B, T, K, N // K, H)
    logits = [_logits(q_BTKGH, k_BSKH, mask, softcap=softcap) for k_BSKH, _, mask in parts]
    top_BKGT = functools.reduce(jnp.maximum, [part.max(axis=-1) for part in logits])
    top_BKGT = jax.lax.stop_gradient(jnp.maximum(top_BKGT, NOTHING_SEEN))
    weights = [jnp.exp(part - top_BKGT[..., None]) for part in logits]
    total_BKGT = _at_least_something(sum(part.sum(axis=-1) for part in weights))
    out_BTKGH = sum(
        jnp.einsum("BKGTS,BSKH->BTKGH", part.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
        for part, (_, v_BSKH, _) in zip(weights, parts, strict=True)
    )
    out_BTKGH = out_BTKGH / total_BKGT.transpose(0, 3, 1, 2)[..., None]
    return out_BTKGH.astype(q_BTNH.dtype).reshape(B, T, N, H)


def _logits(q_BTKGH, k_BSKH, mask: MaskSpec, *, softcap: float | None):
    """Masked float32 logits [B, K, G, T, S] of scaled queries."""
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    seen_BTS = allowed(mask, q_length=logits.shape[3], k_length=logits.shape[4])
    return logits if seen_BTS is None else jnp.where(seen_BTS[:, None, None, :, :], logits, MASKED)


def _at_least_something(total):
    """Sums of weights that may be divided by: a query that sees nothing has the sum 0, and gets the output 0."""
    return jnp.where(total == 0.0, 1.0, total)


# Causal rows, in blocks of queries: the keys past a block are never multiplied.


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The static facts of one call. keep: whether the weights are kept for the backward pass."""

    length: int
    window: int | None
    scale: float
    keep: bool

    def cuts(self) -> list[tuple[slice, slice]]:
        """(queries, keys that any of them sees) of each block; keys begin at a multiple of 64, for alignment."""
        size = max(BLOCK, -(-self.length // (MAX_BLOCKS * BLOCK)) * BLOCK)
        starts = range(0, self.length, size)
        ends = [min(start + size, self.length) for start in starts]
        firsts = [0 if self.window is None else max(0, start - self.window + 1) // 64 * 64 for start in starts]
        return [(slice(a, e), slice(first, e)) for a, e, first in zip(starts, ends, firsts, strict=True)]


def _is_blockwise(mask: MaskSpec, q_BTNH: jax.Array, k_BSKH: jax.Array, *, softcap: float | None) -> bool:
    if not (mask.causal and mask.by_index and mask.static_window) or mask.prefix_lengths_B is not None:
        return False
    if softcap is not None or q_BTNH.shape[1] != k_BSKH.shape[1]:
        return False
    return shards("length", q_BTNH.shape[1]) == 1


def _blockwise(q_BTNH, k_BSKH, v_BSKH, mask: MaskSpec, *, scale: float):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    blocks = _Blocks(length=T, window=mask.window, scale=scale, keep=False)
    area = sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks.cuts())
    devices = max(get_abstract_mesh().size, 1)
    blocks = dataclasses.replace(blocks, keep=4 * B * N * area <= KEEP_BYTES * devices)
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKGTH: jax.Array = _over_blocks(blocks, q_BKGTH, k_BKSH, v_BKSH, mask.q_segments_BT)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    if mask.q_segments_BT is None:
        return out_BTNH
    # Padding sees nothing; all its logits are MASKED, and it got the mean of all values.
    return jnp.where((mask.q_segments_BT != 0)[:, :, None, None], out_BTNH, 0)


# Q is the queries of one block for all G heads that share keys. The order of the operations below is one that XLA's
# CPU compiler recognises (softmax and product become one library call); see docs/log.md before changing it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_blocks(blocks: _Blocks, q_BKGTH, k_BKSH, v_BKSH, segments_BT):
    return _forward(blocks, q_BKGTH, k_BKSH, v_BKSH, segments_BT)[0]


def _forward(blocks: _Blocks, q_BKGTH, k_BKSH, v_BKSH, segments_BT):
    G = q_BKGTH.shape[2]
    q_BKGTH = q_BKGTH * blocks.scale
    outs, sums, kept = [], [], []
    for block in blocks.cuts():
        q, keys = block
        logits_BKQS = _block_logits(blocks, block, q_BKGTH, k_BKSH, segments_BT)
        top_BKQ = logits_BKQS.max(axis=-1)
        weights_BKQS = jnp.exp(logits_BKQS - top_BKQ[..., None])
        total_BKQ = weights_BKQS.sum(axis=-1)
        weights_BKQS = weights_BKQS.astype(v_BKSH.dtype)
        out_BKQH = _product("BKQS,BKSH->BKQH", weights_BKQS, v_BKSH[:, :, keys]) / total_BKQ[..., None]
        outs.append(_by_group(out_BKQH.astype(q_BKGTH.dtype), G))
        sums.append(_by_group(total_BKQ if blocks.keep else top_BKQ + jnp.log(total_BKQ), G))
        kept.append(weights_BKQS if blocks.keep else None)
    out_BKGTH, sums_BKGT = jnp.concatenate(outs, axis=3), jnp.concatenate(sums, axis=3)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, sums_BKGT, kept)


def _backward(blocks: _Blocks, saved, g_BKGTH):
    """d logits = weights (d weights - rowsum), where the row's sum of d weights * weights is that of d out * out."""
    q_BKGTH, k_BKSH, v_BKSH, segments_BT, out_BKGTH, sums_BKGT, kept = saved
    G, dtype = q_BKGTH.shape[2], q_BKGTH.dtype
    if blocks.keep:  # kept weights are not yet divided by their sums
        g_BKGTH = (g_BKGTH / sums_BKGT[..., None]).astype(dtype)
    rowsum_BKGT = (g_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(axis=-1)
    g_q, g_k, g_v = [], [], []
    for block, weights_BKQS in zip(blocks.cuts(), kept, strict=True):
        q, keys = block
        q_BKQH, g_BKQH = _joined(q_BKGTH[:, :, :, q]), _joined(g_BKGTH[:, :, :, q])
        if weights_BKQS is None:
            logits_BKQS = _block_logits(blocks, block, q_BKGTH, k_BKSH, segments_BT)
            weights_BKQS = jnp.exp(logits_BKQS - _joined(sums_BKGT[:, :, :, q])[..., None])
        g_BKQS = _product("BKQH,BKSH->BKQS", g_BKQH, v_BKSH[:, :, keys])
        g_BKQS = (weights_BKQS * (g_BKQS - _joined(rowsum_BKGT[:, :, :, q])[..., None])).astype(dtype)
        g_q.append(_by_group(_product("BKQS,BKSH->BKQH", g_BKQS, k_BKSH[:, :, keys]), G))
        g_k.append(_product("BKQS,BKQH->BKSH", g_BKQS, q_BKQH))
        g_v.append(_product("BKQS,BKQH->BKSH", weights_BKQS.astype(dtype), g_BKQH))
    g_q_BKGTH = (jnp.concatenate(g_q, axis=3) * blocks.scale).astype(dtype)
    g_k_BKSH, g_v_BKSH = (_sum_over_keys(blocks, parts).astype(k_BKSH.dtype) for parts in (g_k, g_v))
    return g_q_BKGTH, g_k_BKSH, g_v_BKSH, None


_over_blocks.defvjp(_forward, _backward)


def _block_logits(blocks: _Blocks, block: tuple[slice, slice], q_BKGTH, k_BKSH, segments_BT):
    q, keys = block
    logits_BKQS = _product("BKQH,BKSH->BKQS", _joined(q_BKGTH[:, :, :, q]), k_BKSH[:, :, keys])
    mask = MaskSpec(
        causal=True,
        window=blocks.window,
        q_segments_BT=None if segments_BT is None else segments_BT[:, q],
        k_segments_BS=None if segments_BT is None else segments_BT[:, keys],
    )
    seen_BTS = allowed(
        mask, q_length=q.stop - q.start, k_length=keys.stop - keys.start, q_start=q.start, k_start=keys.start
    )
    assert seen_BTS is not None  # causal: never None
    seen_BQS = jnp.tile(seen_BTS, (1, q_BKGTH.shape[2], 1))
    return jnp.where(seen_BQS[:, None, :, :], logits_BKQS, MASKED)


def _joined(x_BKGt):
    """[B, K, G, t, ...] as [B, K, G * t, ...]."""
    return x_BKGt.reshape(*x_BKGt.shape[:2], -1, *x_BKGt.shape[4:])


def _by_group(x_BKQ, groups: int):
    """The inverse of `_joined`."""
    return x_BKQ.reshape(*x_BKQ.shape[:2], groups, -1, *x_BKQ.shape[3:])


def _sum_over_keys(blocks: _Blocks, parts):
    """Gradients of the keys of each block [B, K, keys, H], added up in place, [B, K, S, H]."""
    total_BKSH: Any = 0.0
    for (_, keys), part in zip(blocks.cuts(), parts, strict=True):
        around = (keys.start, blocks.length - keys.stop)
        total_BKSH = total_BKSH + jnp.pad(part, ((0, 0), (0, 0), around, (0, 0)))
    return total_BKSH


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
