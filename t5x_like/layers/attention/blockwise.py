"""Attention in blocks of queries, for CPUs: keys that no query of a block may see are never multiplied.

The backward pass is written out, as the compiler's own keeps and moves more. The choice between paths is in
choice.py, the path for masks that this cannot serve in materialised.py.

Legend: B batch, T query length, S key length, N heads, K kv heads, G = N / K queries a kv head, H head size, b 1 or B.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from t5x_like.layers.attention.masks import MASKED, NOTHING_SEEN, MaskSpec, allowed, at_least_something
from t5x_like.layers.platform import matmul_precision
from t5x_like.parallel.sharding import shards

# Queries of one block. Of a causal row of n blocks (n + 1) / 2n is computed: 62% of 512 tokens in blocks of 128.
# Smaller blocks give matrix products that a CPU does less well, more of them a longer compilation.
BLOCK, MAX_BLOCKS = 128, 16
# Weights of one layer up to this size, a device, are kept for the backward pass, which spares a tenth of its time;
# larger ones are computed again.
KEEP_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The static facts of one call. blind: some query may see no key. keep: whether the weights are kept for the
    backward pass."""

    q_length: int
    k_length: int
    causal: bool
    window: int | None
    prefix: bool
    blind: bool
    scale: float
    keep: bool

    def cuts(self) -> list[tuple[slice, slice]]:
        """(queries, keys that any of them sees) of each block; keys begin at a multiple of 64, for alignment."""
        size = max(BLOCK, -(-self.q_length // (MAX_BLOCKS * BLOCK)) * BLOCK)
        starts = range(0, self.q_length, size)
        return [self._cut(start, min(start + size, self.q_length)) for start in starts]

    def _cut(self, start: int, end: int) -> tuple[slice, slice]:
        if self.prefix:  # keys of a prefix may stand anywhere
            return slice(start, end), slice(0, self.k_length)
        return slice(start, end), keys_of(start, end, self.k_length, self.causal, self.window)


def keys_of(start: int, end: int, k_length: int, causal: bool, window: int | None) -> slice:
    """The keys that the queries from start to end may see; a window's ends are moved out to multiples of 64, since
    kernels want even lengths."""
    first, last = 0, k_length
    if window is not None:
        first = max(0, start - window + 1) // 64 * 64
    if causal:
        last = end
    elif window is not None:
        last = min(k_length, -(-(end + window - 1) // 64) * 64)
    return slice(min(first, last - 1), last)


def why_not(q_BTNH: Any, k_BSKH: Any, mask: MaskSpec, *, softcap: bool) -> str:
    """The reason why this path cannot serve a call, in words; empty if it can."""
    q_length, k_length = q_BTNH.shape[1], k_BSKH.shape[1]
    if not mask.by_index:
        return "positions are given"
    if not mask.static_window:
        return "the window is traced"
    if softcap:
        return "a softcap"
    if q_length != k_length and (mask.causal or mask.window is not None):
        return f"{q_length} queries and {k_length} keys under a mask by distance"
    parts = shards("length", q_length)
    return f"rows are split over {parts} devices" if parts > 1 else ""


def blockwise(q_BTNH, k_BSKH, v_BSKH, mask: MaskSpec, *, scale: float, bias_bNTS: jax.Array | None):
    """bias_bNTS: added to the logits, float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_segments_BT, k_segments_BS = mask.q_segments_BT, mask.k_segments_BS
    alike = q_segments_BT is k_segments_BS  # then each query sees at least itself, padding aside
    blocks = Blocks(
        q_length=T,
        k_length=k_BSKH.shape[1],
        causal=mask.causal,
        window=mask.window,
        prefix=mask.k_prefix_BS is not None,
        blind=not alike,
        scale=scale,
        keep=False,
    )
    area = sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks.cuts())
    devices = max(get_abstract_mesh().size, 1)
    blocks = dataclasses.replace(blocks, keep=4 * B * N * area <= KEEP_BYTES * devices)
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    bias_bKGTS = None
    if bias_bNTS is not None:
        # Written out once: XLA's CPU compiler would look the bias up anew for every row, a tenth of a T5's step.
        once_bNTS: jax.Array = jax.lax.optimization_barrier(bias_bNTS)
        bias_bKGTS = once_bNTS.reshape(once_bNTS.shape[0], K, N // K, *once_bNTS.shape[2:])
    marks = (q_segments_BT, None if alike else k_segments_BS, mask.k_prefix_BS)
    out_BKGTH: jax.Array = _over_blocks(blocks, q_BKGTH, k_BKSH, v_BKSH, bias_bKGTS, marks)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    if q_segments_BT is None or blocks.blind:
        return out_BTNH
    # Padding sees nothing; all its logits are MASKED, and it got the mean of all values.
    return jnp.where((q_segments_BT != 0)[:, :, None, None], out_BTNH, 0)


# Q is the queries of one block for all G heads that share keys. The order of the operations below is one that XLA's
# CPU compiler recognises (softmax and product become one library call); see docs/log.md before changing it.
# marks: segments of queries, those of keys (None: the same), keys of a prefix.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_blocks(blocks: Blocks, q_BKGTH, k_BKSH, v_BKSH, bias_bKGTS, marks):
    return _forward(blocks, q_BKGTH, k_BKSH, v_BKSH, bias_bKGTS, marks)[0]


def _forward(blocks: Blocks, q_BKGTH, k_BKSH, v_BKSH, bias_bKGTS, marks):
    G = q_BKGTH.shape[2]
    q_BKGTH = q_BKGTH * blocks.scale
    outs, sums, kept = [], [], []
    for block in blocks.cuts():
        q, keys = block
        logits_BKQS = _block_logits(blocks, block, q_BKGTH, k_BKSH, bias_bKGTS, marks)
        top_BKQ = logits_BKQS.max(axis=-1)
        top_BKQ = jnp.maximum(top_BKQ, NOTHING_SEEN) if blocks.blind else top_BKQ
        weights_BKQS = jnp.exp(logits_BKQS - top_BKQ[..., None])
        total_BKQ = weights_BKQS.sum(axis=-1)
        total_BKQ = at_least_something(total_BKQ) if blocks.blind else total_BKQ
        weights_BKQS = weights_BKQS.astype(v_BKSH.dtype)
        out_BKQH = _product("BKQS,BKSH->BKQH", weights_BKQS, v_BKSH[:, :, keys]) / total_BKQ[..., None]
        outs.append(_by_group(out_BKQH.astype(q_BKGTH.dtype), G))
        sums.append(_by_group(total_BKQ if blocks.keep else top_BKQ + jnp.log(total_BKQ), G))
        kept.append(weights_BKQS if blocks.keep else None)
    out_BKGTH, sums_BKGT = jnp.concatenate(outs, axis=3), jnp.concatenate(sums, axis=3)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, bias_bKGTS, marks, out_BKGTH, sums_BKGT, kept)


def _backward(blocks: Blocks, saved, g_BKGTH):
    """d logits = weights (d weights - rowsum), where the row's sum of d weights * weights is that of d out * out."""
    q_BKGTH, k_BKSH, v_BKSH, bias_bKGTS, marks, out_BKGTH, sums_BKGT, kept = saved
    G, dtype = q_BKGTH.shape[2], q_BKGTH.dtype
    if blocks.keep:  # kept weights are not yet divided by their sums
        g_BKGTH = (g_BKGTH / sums_BKGT[..., None]).astype(dtype)
    rowsum_BKGT = (g_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(axis=-1)
    g_q, g_k, g_v, g_bias = [], [], [], []
    for block, weights_BKQS in zip(blocks.cuts(), kept, strict=True):
        q, keys = block
        q_BKQH, g_BKQH = _joined(q_BKGTH[:, :, :, q]), _joined(g_BKGTH[:, :, :, q])
        if weights_BKQS is None:
            logits_BKQS = _block_logits(blocks, block, q_BKGTH, k_BKSH, bias_bKGTS, marks)
            weights_BKQS = jnp.exp(logits_BKQS - _joined(sums_BKGT[:, :, :, q])[..., None])
        g_BKQS = _product("BKQH,BKSH->BKQS", g_BKQH, v_BKSH[:, :, keys])
        g_BKQS = weights_BKQS * (g_BKQS - _joined(rowsum_BKGT[:, :, :, q])[..., None])
        if bias_bKGTS is not None:
            g_bias.append(_bias_gradient(blocks, block, g_BKQS, bias_bKGTS))
        g_BKQS = g_BKQS.astype(dtype)
        g_q.append(_by_group(_product("BKQS,BKSH->BKQH", g_BKQS, k_BKSH[:, :, keys]), G))
        g_k.append(_product("BKQS,BKQH->BKSH", g_BKQS, q_BKQH))
        g_v.append(_product("BKQS,BKQH->BKSH", weights_BKQS.astype(dtype), g_BKQH))
    g_q_BKGTH = (jnp.concatenate(g_q, axis=3) * blocks.scale).astype(dtype)
    g_k_BKSH, g_v_BKSH = (_sum_over_keys(blocks, parts).astype(k_BKSH.dtype) for parts in (g_k, g_v))
    g_bias_bKGTS = jnp.concatenate(g_bias, axis=3) if g_bias else None
    return g_q_BKGTH, g_k_BKSH, g_v_BKSH, g_bias_bKGTS, None


_over_blocks.defvjp(_forward, _backward)


def _block_logits(blocks: Blocks, block: tuple[slice, slice], q_BKGTH, k_BKSH, bias_bKGTS, marks):
    q, keys = block
    logits_BKQS = _product("BKQH,BKSH->BKQS", _joined(q_BKGTH[:, :, :, q]), k_BKSH[:, :, keys])
    if bias_bKGTS is not None:
        bias_bKQS = _joined(bias_bKGTS[:, :, :, q, keys])
        logits_BKQS = logits_BKQS + jnp.broadcast_to(bias_bKQS, logits_BKQS.shape)
    q_segments_BT, k_segments_BS, k_prefix_BS = marks
    k_segments_BS = q_segments_BT if k_segments_BS is None else k_segments_BS
    mask = MaskSpec(
        causal=blocks.causal,
        window=blocks.window,
        k_prefix_BS=None if k_prefix_BS is None else k_prefix_BS[:, keys],
        q_segments_BT=None if q_segments_BT is None else q_segments_BT[:, q],
        k_segments_BS=None if k_segments_BS is None else k_segments_BS[:, keys],
    )
    seen_BTS = allowed(
        mask, q_length=q.stop - q.start, k_length=keys.stop - keys.start, q_start=q.start, k_start=keys.start
    )
    if seen_BTS is None:
        return logits_BKQS
    seen_BQS = jnp.tile(seen_BTS, (1, q_BKGTH.shape[2], 1))
    return jnp.where(seen_BQS[:, None, :, :], logits_BKQS, MASKED)


def _bias_gradient(blocks: Blocks, block: tuple[slice, slice], g_BKQS, bias_bKGTS):
    """The gradient of a block's logits as that of its rows of the bias, [b, K, G, t, S]."""
    _, keys = block
    g_bKQS = _sum_over_rows(g_BKQS) if bias_bKGTS.shape[0] == 1 else g_BKQS
    around = (keys.start, blocks.k_length - keys.stop)
    return jnp.pad(_by_group(g_bKQS, bias_bKGTS.shape[2]), ((0, 0),) * 4 + (around,))


def _sum_over_rows(g_BKQS):
    """[1, K, Q, S]. As a product with ones: XLA's CPU compiler takes 15 times as long for a sum over a leading dim."""
    return _product("AB,BKQS->AKQS", jnp.ones((1, g_BKQS.shape[0]), g_BKQS.dtype), g_BKQS)


def _joined(x_BKGt):
    """[B, K, G, t, ...] as [B, K, G * t, ...]."""
    return x_BKGt.reshape(*x_BKGt.shape[:2], -1, *x_BKGt.shape[4:])


def _by_group(x_BKQ, groups: int):
    """The inverse of `_joined`."""
    return x_BKQ.reshape(*x_BKQ.shape[:2], groups, -1, *x_BKQ.shape[3:])


def _sum_over_keys(blocks: Blocks, parts):
    """Gradients of the keys of each block [B, K, keys, H], added up in place, [B, K, S, H]."""
    total_BKSH: Any = 0.0
    for (_, keys), part in zip(blocks.cuts(), parts, strict=True):
        around = (keys.start, blocks.k_length - keys.stop)
        total_BKSH = total_BKSH + jnp.pad(part, ((0, 0), (0, 0), around, (0, 0)))
    return total_BKSH


def _product(equation: str, a, b):
    return jnp.einsum(equation, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)
