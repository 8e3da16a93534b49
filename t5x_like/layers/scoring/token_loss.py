"""The sum of a loss over tokens, whose gradient is formed in the forward pass: the head is multiplied three times.

`token_scores` takes any cotangent of each token's scores, and these are known in the backward pass alone: there it
computes all logits again, a fourth product. Where the loss is a sum over tokens of a function of their scores and of
given numbers, the gradient needs nothing of the backward pass but a factor. Then a chunk's logits are made once, and
what waits for the backward pass is the gradient itself: [B, T, D], and the head's, summed over all devices.

NOT here: what the loss is (objectives), and losses whose terms mix tokens (those of pairs or sequences), which use
token_scores.

Legend: B batch, T length, D model, V vocab (padded), M tokens of one device, W vocab of one device, C tokens of a
chunk, b columns of a block.
"""

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from t5x_like.layers.scoring.head import Head
from t5x_like.layers.scoring.head_layout import HeadLayout, head_layout
from t5x_like.layers.scoring.products import chunk_gradients, flat, in_chunks, multiplied, products
from t5x_like.layers.scoring.token_scores import (
    Names,
    Scores,
    combined,
    logit_gradients,
    score,
    statistics,
    token_scores,
    with_logz,
)

# (scores, weights) -> (the loss of these tokens, {name: another sum over them}).
LossOf = Callable[[Scores, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

# So much of the head's gradient is made and summed over devices at a time, in float32, where the gradient of all logits
# is kept.
SCATTER_BYTES = 512 * 2**20


def token_loss(
    loss_of: LossOf,
    x_BTD: Float[Array, "B T D"],
    head: Head,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    total: Float[Array, ""],
    *,
    want: Collection[str],
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(loss / total, the other sums), of `loss_of(scores, weights)`, called for parts of the tokens and added up.

    loss_of: a sum over tokens, 0 for tokens of weight 0; the same function at every call, since programs are kept by
    it. want, chunk: as of `token_scores`. The other sums, weights and total have no gradient.
    """
    names = tuple(sorted(want))
    weight_VD, bias_V = head.arrays(x_BTD.dtype)
    layout = head_layout(x_BTD.shape[:2], weight_VD.shape, head, temperature=None, chunk=chunk)
    weights_BT, total = jax.lax.stop_gradient((weights_BT, total))
    if not layout.rows:  # all logits are kept: there is no product to save
        loss, sums = loss_of(token_scores(x_BTD, head, targets_BT, want=want, chunk=chunk), weights_BT)
        return loss / total, sums
    return _loss(layout, names, loss_of, x_BTD, weight_VD, bias_V, targets_BT, weights_BT, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(layout: HeadLayout, want: Names, loss_of: LossOf, x_BTD, weight_VD, bias_V, targets_BT, weights_BT, total):
    """Without a gradient: the scores, and what the loss makes of them."""
    found: Any = score(layout, want, x_BTD, weight_VD, bias_V, targets_BT)
    loss, sums = loss_of(Scores(**found), weights_BT)
    return loss / total, sums


def _forward(layout: HeadLayout, want: Names, loss_of: LossOf, *inputs):
    tokens, one = layout.tokens, PartitionSpec()
    run = layout.on_mesh(
        functools.partial(_local, layout, want, loss_of),
        inputs=(tokens, layout.weight, layout.bias, tokens, tokens, one),
        outputs=(one, (tokens, layout.weight, layout.bias)),
    )
    return run(*inputs)


def _backward(layout: HeadLayout, want: Names, loss_of: LossOf, gradients, cotangents):
    factor, _ = cotangents  # 1 where the loss is all that is minimised
    scaled = jax.tree.map(lambda g: (factor * g.astype(jnp.float32)).astype(g.dtype), gradients)
    return (*scaled, None, None, None)


_loss.defvjp(_forward, _backward)


# One device's part.


def _local(layout: HeadLayout, want: Names, loss_of: LossOf, x_BTD, weight_VD, bias_V, targets_BT, weights_BT, total):
    """((loss / total, other sums), gradients of x, weight and bias), each summed over the mesh."""
    weight_DW, bias_W = layout.gather(x_BTD.dtype, weight_VD, bias_V)
    needed = with_logz(want)

    def slopes(x_CD, targets_C, weights_C) -> tuple[Any, list[jax.Array]]:
        """(sums over a chunk, the gradient of its products, block by block)."""
        blocks = products(layout, x_CD, weight_DW, bias_W)
        shape = targets_C.shape
        scores = combined(layout, needed, statistics(layout, needed, blocks, targets_C), shape=shape)
        wanted = {name: scores[name] for name in want}
        loss, back, others = jax.vjp(lambda found: loss_of(Scores(**found), weights_C), wanted, has_aux=True)
        (cotangents,) = back(1.0 / total)
        cotangents.pop("best", None)
        starts = [start for start, _ in layout.blocks]
        pairs = zip(starts, blocks, strict=True)
        return (loss, others), [logit_gradients(layout, *pair, targets_C, scores, cotangents) for pair in pairs]

    x_MD, targets_M, weights_M = flat(x_BTD), flat(targets_BT), flat(weights_BT)
    M, D = x_MD.shape
    # What is less: the gradient of all logits in the compute type, or that of the head in float32.
    kept = x_MD.dtype.itemsize * M < 4 * D

    def chunk(x_CD, *rest):
        of_loss, gradients = slopes(x_CD, *rest)
        g_x_CD, blocks, g_W = chunk_gradients(layout, x_CD, weight_DW, gradients)
        g_CW = jnp.concatenate(blocks, axis=1)
        g_WD = None if kept else multiplied("CW,CD->WD", g_CW, x_CD)
        return (of_loss, None if bias_W is None else g_W, g_WD), (g_x_CD, g_CW if kept else None)

    (of_loss, g_W, g_WD), (g_x_MD, g_MW) = in_chunks(chunk, layout.rows, x_MD, targets_M, weights_M)
    loss, others = jax.tree.map(lambda a: jax.lax.psum(a, layout.token_axes) if layout.token_axes else a, of_loss)
    if layout.vocab_axes:
        g_x_MD = jax.lax.psum(g_x_MD, layout.vocab_axes)
    if kept:
        g_VD = _scattered(layout, functools.partial(_of_columns, g_MW, x_MD), D)
    else:
        g_VD = layout.scatter_columns(g_WD)
    # The device's part is cut out now: fused with what reads it, the whole would be held until then.
    g_VD = jax.lax.optimization_barrier(g_VD.astype(weight_VD.dtype))
    g_V = None if bias_V is None else layout.scatter_bias(g_W).astype(bias_V.dtype)
    return (loss / total, others), (g_x_MD.reshape(x_BTD.shape), g_VD, g_V)


def _of_columns(g_MW: jax.Array, x_MD: jax.Array, start: Any, size: int) -> jax.Array:
    return multiplied("MW,MD->WD", jax.lax.dynamic_slice_in_dim(g_MW, start, size, 1), x_MD)


def _scattered(layout: HeadLayout, part: Callable[[Any, int], jax.Array], width: int) -> jax.Array:
    """The head's gradient summed over all tokens and split as the weight is, in parts of its columns one after the
    other. `part(start, size)`: [size, D] float32 of this device's tokens."""
    columns = layout.columns
    parts = math.ceil(4 * columns * width / SCATTER_BYTES)
    size = 128 * math.ceil(columns / parts / 128)
    if parts == 1 or size >= columns or not layout.mesh_axes or any(dim == 0 for dim, _ in layout.gathered):
        return layout.scatter_columns(part(0, columns))
    starts = jnp.minimum(jnp.arange(0, columns, size), columns - size)  # the last part begins within the one before

    def one(whole, start):
        return jax.lax.dynamic_update_slice_in_dim(whole, layout.scatter_columns(part(start, size)), start, 0), None

    split = jax.eval_shape(layout.scatter_columns, jax.ShapeDtypeStruct((size, width), jnp.float32))
    return jax.lax.scan(one, jnp.zeros((columns, split.shape[1]), jnp.float32), starts)[0]
