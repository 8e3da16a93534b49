"""Products of one device's tokens with its columns of the head, chunk by chunk, and the way back to gradients.

What is computed from the products is another file's business (token_scores.py, token_divergence.py).

Legend: B batch, T length, D model, M tokens of one device, W vocab of one device, C tokens of a chunk, b columns of a
block, n chunks.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_like.layers.attention.masks import MASKED
from t5x_like.layers.platform import matmul_precision
from t5x_like.layers.scoring.head import capped
from t5x_like.layers.scoring.head_layout import HeadLayout


def products(layout: HeadLayout, x_CD, weight_DW, bias_W) -> list[jax.Array]:
    """Float32 scale * x W + bias [C, b], block by block."""
    blocks = [multiplied("CD,Db->Cb", x_CD, weight_DW[:, start:end]) for start, end in layout.blocks]
    if layout.scale is not None:
        blocks = [layout.scale * product_Cb for product_Cb in blocks]
    if bias_W is None:
        return blocks
    parts = [bias_W[start:end].astype(jnp.float32)[None, :] for start, end in layout.blocks]
    return [product_Cb + bias_1b for product_Cb, bias_1b in zip(blocks, parts, strict=True)]


def block_logits(layout: HeadLayout, start: int, product_Cb):
    """Logits of the block at `start`, with MASKED where the vocabulary is padding."""
    values_Cb = capped(product_Cb, layout.softcap)
    values_Cb = values_Cb if layout.temperature is None else values_Cb / layout.temperature
    if not layout.padded:
        return values_Cb
    return jnp.where(is_real(layout, start, product_Cb.shape[1]), values_Cb, MASKED)


def is_real(layout: HeadLayout, start: int, columns: int):
    """[1, b]: which columns of the block at `start` are no padding."""
    return (layout.first() + start + jnp.arange(columns) < layout.vocab_size)[None, :]


def product_gradient(layout: HeadLayout, product_Cb, g_logits_Cb):
    """The gradient of the products from that of the logits."""
    g_Cb = g_logits_Cb if layout.temperature is None else g_logits_Cb / layout.temperature
    if layout.softcap is None:
        return g_Cb
    return g_Cb * (1.0 - jnp.square(capped(product_Cb, layout.softcap) / layout.softcap))  # d tanh = 1 - tanh^2


def head_gradients(
    layout: HeadLayout, gradients_of: Callable[..., Iterable[jax.Array]], x_BTD, weight_DW, bias_W, arrays: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Float32 gradients of x [B, T, D], of the gathered weight and of its bias, from this device's tokens.

    gradients_of(x_CD, arrays of these tokens): the gradient of the products [C, b] of each block. That of x is summed
    over the parts of the vocabulary, those of weight and bias are not yet summed over the tokens of other devices.
    """

    def chunk(sums, slices):
        x_CD, rest = slices
        g_x_CD, blocks, g_bias_W = chunk_gradients(layout, x_CD, weight_DW, gradients_of(x_CD, rest))
        g_weight = [multiplied("CD,Cb->Db", x_CD, g_Cb) for g_Cb in blocks]
        new = (jnp.concatenate(g_weight, axis=1), None if bias_W is None else g_bias_W)
        return new if sums is None else jax.tree.map(jnp.add, sums, new), g_x_CD

    inputs = jax.tree.map(flat, (x_BTD, arrays))
    tokens = inputs[0].shape[0]
    sums: Any
    if _is_cut(layout.rows, tokens):
        none = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), (weight_DW, bias_W))
        sums, g_x_nCD = jax.lax.scan(chunk, none, jax.tree.map(functools.partial(_cut, layout.rows), inputs))
        g_x_MD = _joined(g_x_nCD, tokens)
    else:
        sums, g_x_MD = chunk(None, inputs)
    if layout.vocab_axes:
        g_x_MD = jax.lax.psum(g_x_MD, layout.vocab_axes)
    return g_x_MD.reshape(x_BTD.shape), *sums


def chunk_gradients(
    layout: HeadLayout, x_CD, weight_DW, gradients: Iterable[jax.Array]
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """(the gradient of x [C, D] in its type, those of the matrix products [C, b], that of the bias [W]), of a chunk.

    gradients: of `products`, float32 [C, b], block by block. Those of the matrix products have the type of x, as every
    cotangent of one; what is made of them is summed in float32.
    """
    g_x, g_bias, multiplicands = [], [], []
    for (start, end), g_Cb in zip(layout.blocks, gradients, strict=True):
        g_bias.append(g_Cb.sum(axis=0))
        g_Cb = g_Cb if layout.scale is None else layout.scale * g_Cb
        g_Cb = g_Cb.astype(x_CD.dtype)
        g_x.append(multiplied("Cb,Db->CD", g_Cb, weight_DW[:, start:end]))
        multiplicands.append(g_Cb)
    return functools.reduce(jnp.add, g_x).astype(x_CD.dtype), multiplicands, jnp.concatenate(g_bias)


def scattered(layout: HeadLayout, g_DW, g_W, weight_VD, bias_V):
    """Gradients of weight and bias summed over all tokens, split and typed as the parameters are."""
    g_VD = layout.scatter_weight(g_DW).astype(weight_VD.dtype)
    return g_VD, None if bias_V is None else layout.scatter_bias(g_W).astype(bias_V.dtype)


def over_chunks(function: Callable[..., Any], rows: int, *arrays) -> Any:
    """`function` of [M, ...] arrays, called for `rows` tokens at a time; 0 for all at once."""
    tokens = arrays[0].shape[0]
    if not _is_cut(rows, tokens):
        return function(*arrays)
    cut = [jax.tree.map(functools.partial(_cut, rows), array) for array in arrays]
    results = jax.lax.map(lambda slices: function(*slices), cut)
    return jax.tree.map(lambda array: _joined(array, tokens), results)


def in_chunks(function: Callable[..., Any], rows: int, *arrays) -> Any:
    """`function` of [M, ...] arrays, called for `rows` tokens at a time: it gives (sums over them, values of each), and
    the sums are added up."""
    tokens = arrays[0].shape[0]
    if not _is_cut(rows, tokens):
        return function(*arrays)
    cut = [_cut(rows, array) for array in arrays]

    def step(sums, slices):
        new, values = function(*slices)
        return jax.tree.map(jnp.add, sums, new), values

    shapes, _ = jax.eval_shape(function, *(array[0] for array in cut))
    sums, values = jax.lax.scan(step, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), cut)
    return sums, jax.tree.map(lambda array: _joined(array, tokens), values)


def flat(array):
    """[B, T, ...] as [M, ...]."""
    return array.reshape(-1, *array.shape[2:])


def multiplied(equation: str, a, b):
    """`jnp.einsum` with a float32 result."""
    return jnp.einsum(equation, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def _is_cut(rows: int, tokens: int) -> bool:
    return 0 < rows < tokens


def _cut(rows: int, array):
    """[M, ...] as [n, rows, ...], filled up with zeros: tokens whose cotangent is zero."""
    count = math.ceil(array.shape[0] / rows)
    padding = [(0, count * rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(count, rows, *array.shape[1:])


def _joined(array, tokens: int):
    return flat(array)[:tokens]
