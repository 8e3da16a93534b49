"""The one scorer: log-probabilities of given tokens from hidden states and a head, without full float32 logits.

`token_log_probs` serves every objective and evaluation, because its cotangents are per token. It is NOT a loss:
weights, label smoothing, z-loss and sums belong to objectives. `logits` is for decoding a few positions.

On a mesh, forward and backward are each ONE shard_map over all axes: the head is gathered once in the compute type,
each device scores its own tokens chunk by chunk, and the gradient of the head is summed in float32 and scattered once.
Left to the compiler, the head would be gathered, and its gradient reduced, once a chunk.

Legend: B batch, T length, D model, V vocab (padded), M tokens of one device, W vocab of one device, C tokens of a
chunk, b columns of a block, n chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.layers import weights
from t5x_like.layers.head_place import Place, place
from t5x_like.layers.masks import MASKED
from t5x_like.layers.platform import matmul_precision
from t5x_like.parallel.rules import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits. Columns at and past vocab_size are padding: never chosen, never summed.

    rules: the table that the model was built with, which says how the weight lies on the mesh.
    """

    weight: Any  # [V, D] leaf, axes (vocab, embed); the embedding itself when tied
    bias: Any  # [V] leaf, axes (vocab,), or None
    vocab_size: int = dataclasses.field(metadata={"static": True})  # true size, unpadded
    softcap: float | None = dataclasses.field(metadata={"static": True})
    rules: Rules | None = dataclasses.field(metadata={"static": True}, default=None)


def logits(x_BTD: Float[Array, "B T D"], head: Head) -> Float[Array, "B T V"]:
    """Float32 logits, -inf in the padding of the vocabulary. Materialises [B, T, V]: for few positions only."""
    weight_VD, bias_V = _dense(x_BTD, head)
    logits_BTV = _einsum("BTD,VD->BTV", x_BTD, weight_VD.astype(x_BTD.dtype))
    logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V.astype(jnp.float32)[None, None, :]
    real_V = jnp.arange(logits_BTV.shape[-1]) < head.vocab_size
    return jnp.where(real_V[None, None, :], _capped(logits_BTV, head.softcap), -jnp.inf)


def token_log_probs(
    x_BTD: Float[Array, "B T D"], head: Head, targets_BT: Int[Array, "B T"], *, chunk: int | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probability of each target, log of the normaliser), float32.

    chunk: tokens of one device scored at a time; None chooses by size, 0 keeps all logits for the backward pass. A
    target outside the vocabulary gives a meaningless finite number, no error.
    """
    weight_VD, bias_V = _dense(x_BTD, head)
    return _score(_place(x_BTD, weight_VD, head, chunk), x_BTD, weight_VD, bias_V, targets_BT)


def token_predictions(x_BTD: Float[Array, "B T D"], head: Head) -> Int[Array, "B T"]:
    """The most probable token at each position (the lowest id among equals)."""
    weight_VD, bias_V = _dense(x_BTD, head)
    run = _place(x_BTD, weight_VD, head, None).on_mesh(_local_predictions, "tokens weight bias", "tokens")
    return run(x_BTD, weight_VD, bias_V)


def mean_logits(x_BTD: Float[Array, "B T D"], head: Head) -> Float[Array, "B T"]:
    """Mean over the vocabulary of the logits, float32, by linearity: none is formed. Not for a head with a softcap."""
    assert head.softcap is None, "the mean of capped logits is not linear"
    weight_VD, bias_V = _dense(x_BTD, head)
    mean_D = jnp.mean(weight_VD[: head.vocab_size].astype(jnp.float32), axis=0)
    mean_BT = x_BTD.astype(jnp.float32) @ mean_D
    return mean_BT if bias_V is None else mean_BT + jnp.mean(bias_V[: head.vocab_size].astype(jnp.float32))


def _dense(x_BTD: jax.Array, head: Head) -> tuple[jax.Array, jax.Array | None]:
    """The head's weight and bias as arrays: a weight that is no array is written out in the compute type."""
    return weights.dense(head.weight, x_BTD.dtype), None if head.bias is None else weights.value(head.bias)


def _place(x_BTD: jax.Array, weight_VD: jax.Array, head: Head, chunk: int | None) -> Place:
    return place(
        x_BTD.shape[:2],
        weight_VD.shape,
        rules=head.rules,
        vocab_size=head.vocab_size,
        softcap=head.softcap,
        chunk=chunk,
    )


# The gradient, written out.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(here: Place, x_BTD, weight_VD, bias_V, targets_BT):
    run: Any = here.on_mesh(_local_scores, "tokens weight bias tokens", "tokens tokens")
    return run(x_BTD, weight_VD, bias_V, targets_BT)


def _score_forward(here: Place, x_BTD, weight_VD, bias_V, targets_BT):
    inputs, kept = (x_BTD, weight_VD, bias_V, targets_BT), None
    if here.rows:
        scores: Any = _score(here, *inputs)
        logp_BT, logz_BT = scores
    else:
        run = here.on_mesh(_local_scores_kept, "tokens weight bias tokens", "tokens tokens kept")
        logp_BT, logz_BT, kept = run(*inputs)
    return (logp_BT, logz_BT), (*inputs, logz_BT, kept)


def _score_backward(here: Place, saved, cotangents):
    inputs = "tokens weight bias tokens tokens kept tokens tokens"
    run = here.on_mesh(_local_gradients, inputs, "tokens weight bias")
    return (*run(*saved, *cotangents), None)


_score.defvjp(_score_forward, _score_backward)


# One device's part.


def _local_scores(here: Place, x_BTD, weight_VD, bias_V, targets_BT):
    """(logp, logz) of the tokens here."""
    weight_DW, bias_W = here.gather(x_BTD.dtype, weight_VD, bias_V)

    def chunk(x_CD, targets_C):
        return _statistics(here, _products(here, x_CD, weight_DW, bias_W), targets_C)

    statistics: Any = _over_chunks(chunk, here.rows, _flat(x_BTD), _flat(targets_BT))
    return _combined(here, *statistics, shape=targets_BT.shape)


def _local_scores_kept(here: Place, x_BTD, weight_VD, bias_V, targets_BT):
    """(logp, logz, products with the head: blocks [B, T, b]) of the tokens here."""
    weight_DW, bias_W = here.gather(x_BTD.dtype, weight_VD, bias_V)
    products = _products(here, _flat(x_BTD), weight_DW, bias_W)
    logp_BT, logz_BT = _combined(here, *_statistics(here, products, _flat(targets_BT)), shape=targets_BT.shape)
    return logp_BT, logz_BT, [product_Mb.reshape(*targets_BT.shape, -1) for product_Mb in products]


def _local_gradients(here: Place, x_BTD, weight_VD, bias_V, targets_BT, logz_BT, kept, g_logp_BT, g_logz_BT):
    """Gradients of x, weight and bias from this device's tokens, summed over the mesh."""
    weight_DW, bias_W = here.gather(x_BTD.dtype, weight_VD, bias_V)

    def chunk(sums, slices):
        x_CD, products, targets_C, logz_C, g_logp_C, g_logz_C = slices
        products = _products(here, x_CD, weight_DW, bias_W) if products is None else products
        g_x, g_weight, g_bias = [], [], []
        for (start, end), product_Cb in zip(here.blocks, products, strict=True):
            g_Cb = _product_gradient(here, start, product_Cb, targets_C, logz_C, g_logp_C, g_logz_C)
            g_bias.append(g_Cb.sum(axis=0))
            g_Cb = g_Cb.astype(x_CD.dtype)  # as every cotangent of a matrix product; the sums are in float32
            g_x.append(_einsum("Cb,Db->CD", g_Cb, weight_DW[:, start:end]))
            g_weight.append(_einsum("CD,Cb->Db", x_CD, g_Cb))
        new = (jnp.concatenate(g_weight, axis=1), None if bias_W is None else jnp.concatenate(g_bias))
        g_x_CD = functools.reduce(jnp.add, g_x).astype(x_CD.dtype)
        return new if sums is None else jax.tree.map(jnp.add, sums, new), g_x_CD

    kept = None if kept is None else [_flat(block) for block in kept]
    arrays = (_flat(x_BTD), kept, *map(_flat, (targets_BT, logz_BT, g_logp_BT, g_logz_BT)))
    tokens = arrays[0].shape[0]
    sums: Any
    if here.rows in range(1, tokens):
        none = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), (weight_DW, bias_W))
        sums, g_x_nCD = jax.lax.scan(chunk, none, jax.tree.map(functools.partial(_cut, here.rows), arrays))
        g_x_MD = _joined(g_x_nCD, tokens)
    else:
        sums, g_x_MD = chunk(None, arrays)
    if here.vocab_axes:
        g_x_MD = jax.lax.psum(g_x_MD, here.vocab_axes)
    g_VD = here.scatter_weight(sums[0]).astype(weight_VD.dtype)
    g_V = None if bias_V is None else here.scatter_bias(sums[1]).astype(bias_V.dtype)
    return g_x_MD.reshape(x_BTD.shape), g_VD, g_V


def _local_predictions(here: Place, x_BTD, weight_VD, bias_V):
    """The best column of each token here; among equals the first."""
    weight_DW, bias_W = here.gather(x_BTD.dtype, weight_VD, bias_V)

    def chunk(x_CD):
        parts = [
            _logits(here, start, product_Cb)
            for (start, _), product_Cb in zip(here.blocks, _products(here, x_CD, weight_DW, bias_W), strict=True)
        ]
        tops_nC = jnp.stack([part.max(axis=-1) for part in parts])
        bests_nC = jnp.stack(
            [start + jnp.argmax(part, axis=-1) for (start, _), part in zip(here.blocks, parts, strict=True)]
        )
        first_1C = jnp.argmax(tops_nC, axis=0)[None, :]
        return tops_nC.max(axis=0), jnp.take_along_axis(bests_nC, first_1C, axis=0)[0].astype(jnp.int32)

    top_M, best_M = _over_chunks(chunk, here.rows, _flat(x_BTD))
    if here.vocab_axes:
        highest_M = jax.lax.pmax(top_M, here.vocab_axes)
        best_M = jnp.where(top_M == highest_M, best_M + here.first(), jnp.iinfo(jnp.int32).max)
        best_M = jax.lax.pmin(best_M, here.vocab_axes)
    return best_M.reshape(x_BTD.shape[:2])


# The formulas, for the tokens of a chunk and the blocks of columns of one device.


def _einsum(equation: str, a, b):
    return jnp.einsum(equation, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)


def _products(here: Place, x_CD, weight_DW, bias_W) -> list[jax.Array]:
    """Float32 products with the head [C, b], block by block."""
    products = [_einsum("CD,Db->Cb", x_CD, weight_DW[:, start:end]) for start, end in here.blocks]
    if bias_W is None:
        return products
    parts = [bias_W[start:end].astype(jnp.float32)[None, :] for start, end in here.blocks]
    return [product_Cb + bias_1b for product_Cb, bias_1b in zip(products, parts, strict=True)]


def _capped(product, softcap: float | None):
    return product if softcap is None else softcap * jnp.tanh(product / softcap)


def _logits(here: Place, start: int, product_Cb):
    """Logits of the block at `start`, with MASKED where the vocabulary is padding."""
    capped_Cb = _capped(product_Cb, here.softcap)
    if not here.padded:
        return capped_Cb
    columns_b = here.first() + start + jnp.arange(product_Cb.shape[1])
    return jnp.where(columns_b[None, :] < here.vocab_size, capped_Cb, MASKED)


def _is_target(here: Place, start: int, targets_C, columns: int):
    return (targets_C - here.first() - start)[:, None] == jnp.arange(columns)[None, :]


def _statistics(here: Place, products: list[jax.Array], targets_C):
    """Of the columns here: the highest logit, the sum of exp(logit - highest), the target's logit (0 if elsewhere)."""
    starts = [start for start, _ in here.blocks]
    parts = [_logits(here, start, product_Cb) for start, product_Cb in zip(starts, products, strict=True)]
    top_C = functools.reduce(jnp.maximum, [part.max(axis=-1) for part in parts])
    total_C = sum(jnp.exp(part - top_C[:, None]).sum(axis=-1) for part in parts)
    picked_C = sum(
        jnp.where(_is_target(here, start, targets_C, part.shape[1]), part, 0.0).sum(axis=-1)
        for start, part in zip(starts, parts, strict=True)
    )
    return top_C, total_C, picked_C


def _combined(here: Place, top_M, total_M, picked_M, *, shape):
    """(logp, logz) from the statistics of each device's part of the vocabulary."""
    if here.vocab_axes:
        highest_M = jax.lax.pmax(top_M, here.vocab_axes)
        sums_2M = jnp.stack([total_M * jnp.exp(top_M - highest_M), picked_M])
        total_M, picked_M = jax.lax.psum(sums_2M, here.vocab_axes)
        top_M = highest_M
    logz_M = top_M + jnp.log(total_M)
    return (picked_M - logz_M).reshape(shape), logz_M.reshape(shape)


def _product_gradient(here: Place, start: int, product_Cb, targets_C, logz_C, g_logp_C, g_logz_C):
    """With logp = logit[target] - logz: d logp = onehot - softmax, d logz = softmax."""
    softmax_Cb = jnp.exp(_logits(here, start, product_Cb) - logz_C[:, None])
    onehot_Cb = jnp.where(_is_target(here, start, targets_C, product_Cb.shape[1]), g_logp_C[:, None], 0.0)
    g_Cb = (g_logz_C - g_logp_C)[:, None] * softmax_Cb + onehot_Cb
    if here.softcap is None:
        return g_Cb
    return g_Cb * (1.0 - jnp.square(_capped(product_Cb, here.softcap) / here.softcap))  # d tanh = 1 - tanh^2


# Chunks of tokens.


def _flat(array):
    return array.reshape(-1, *array.shape[2:])


def _cut(rows: int, array):
    """[M, ...] as [n, rows, ...], filled up with zeros: tokens whose cotangent is zero."""
    count = math.ceil(array.shape[0] / rows)
    padding = [(0, count * rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(count, rows, *array.shape[1:])


def _joined(array, tokens: int):
    return _flat(array)[:tokens]


def _over_chunks(function: Callable[..., Any], rows: int, *arrays) -> Any:
    tokens = arrays[0].shape[0]
    if rows not in range(1, tokens):
        return function(*arrays)
    results = jax.lax.map(lambda slices: function(*slices), [_cut(rows, array) for array in arrays])
    return jax.tree.map(lambda array: _joined(array, tokens), results)
