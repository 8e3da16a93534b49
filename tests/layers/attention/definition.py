"""Attention as it is defined, written out without any path of the library, and how a test compares with it.

Legend: B batch, T query length, S key length, N heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from t5x_like.layers.attention.choice import attention_path
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.parallel.rules import MESH_AXES

FAST = {"xla_backend_optimization_level": 0}
SEGMENTS = np.array([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24, [3] * 2 + [7] * 20 + [0] * 2, [0] * 24], np.int32)
# The first 0, 5, 24 and 2 keys of the rows, and keys 9 and 10: the first two of a second document.
PREFIX = (np.arange(24) < np.array([0, 5, 24, 2])[:, None]) | np.isin(np.arange(24), (9, 10))


def make_mesh(sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrays(rows=4, length=24, heads=4, kv_heads=2, head=8, seed=0):
    random = np.random.default_rng(seed)
    shapes = (rows, length, heads, head), (rows, length, kv_heads, head), (rows, length, kv_heads, head)
    q, k, v = (random.standard_normal(shape, np.float32) for shape in shapes)
    return 2 * q, k, v, random.standard_normal(shapes[0], np.float32)


def reference(q_BTNH, k_BSKH, v_BSKH, seen_BTS, *, scale, softcap=None, bias=None):
    """The definition: every kv head copied for its queries, one matrix of logits, one softmax."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = jnp.repeat(k_BSKH, group, axis=2), jnp.repeat(v_BSKH, group, axis=2)
    logits_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision="highest")
    if softcap is not None:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    logits_BNTS = logits_BNTS if bias is None else logits_BNTS + bias.repeat(len(logits_BNTS), 0)
    seen_B1TS = jnp.asarray(seen_BTS)[:, None]
    weights_BNTS = jax.nn.softmax(jnp.where(seen_B1TS, logits_BNTS, -1e30), axis=-1)
    weights_BNTS = jnp.where(seen_B1TS, weights_BNTS, 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, precision="highest")


def seen_by_definition(rows, length, *, causal=True, window=None, segments=None, prefix=None):
    """The mask as loops over its definition."""
    seen = np.zeros((rows, length, length), bool)
    for b, t, s in np.ndindex(seen.shape):
        near = window is None or (t - s < window and (causal or s - t < window))
        visible = (s <= t or not causal) and near
        visible |= prefix is not None and prefix[b, s] and (causal or window is not None)
        if segments is not None:
            visible &= segments[b, t] == segments[b, s] != 0
        seen[b, t, s] = visible
    return seen


def spec(*, causal=True, window=None, segments=None, prefix=None):
    segments = None if segments is None else jnp.asarray(segments)
    prefix = None if prefix is None else jnp.asarray(prefix)
    return MaskSpec(causal=causal, window=window, k_prefix_BS=prefix, q_segments_BT=segments, k_segments_BS=segments)


def path(q, k, mask, *, platform, softcap=False, bias=False, capability=None):
    return attention_path(q, k, mask, softcap=softcap, bias=bias, platform=platform, compute_capability=capability)


def with_gradients(function, q, k, v, g):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(g)


def run(function, q, k, v, g):
    return jax.jit(functools.partial(with_gradients, function), compiler_options=FAST)(q, k, v, g)


def assert_same(results, references, bound=1e-5):
    for result, expected in zip(results, references, strict=True):
        assert np.abs(expected).max() > 0.01
        assert np.isfinite(result).all()
        assert np.abs(result - expected).max() <= bound * np.abs(expected).max()
