"""Scores of given tokens in one pass: log-probability, normaliser, best token, entropy, mean logit.

`token_scores` serves every objective and evaluation, because its cotangents are per token. It is NOT a loss: weights,
label smoothing, z-loss and sums belong to objectives.

On a mesh, forward and backward are each ONE shard_map over all axes: the head is gathered once in the compute type,
each device scores its own tokens chunk by chunk, and the gradient of the head is summed in float32 and scattered once.
Left to the compiler, the head would be gathered, and its gradient reduced, once a chunk.

Legend: B batch, T length, D model, V vocab (padded), M tokens of one device, W vocab of one device, C tokens of a
chunk, b columns of a block.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.layers.scoring.head import Head
from t5x_like.layers.scoring.head_layout import HeadLayout, head_layout
from t5x_like.layers.scoring.products import (
    block_logits,
    flat,
    head_gradients,
    is_real,
    over_chunks,
    product_gradient,
    products,
    scattered,
)

Names = tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """[B, T] arrays, float32 but for `best`; None where not wanted. With logits l and p = softmax(l):

    logp: of the target; logz: log sum exp(l); best: the most probable token, the lowest id among equals (no gradient);
    entropy: -sum p log p, in nats; mean: of l over the vocabulary.
    """

    logp: Any = None
    logz: Any = None
    best: Any = None
    entropy: Any = None
    mean: Any = None


WANTED = tuple(field.name for field in dataclasses.fields(Scores))
_OF_SOFTMAX = {"logp", "logz", "entropy"}


def token_scores(
    x_BTD: Float[Array, "B T D"],
    head: Head,
    targets_BT: Int[Array, "B T"] | None = None,
    *,
    want: Collection[str],
    temperature: float | None = None,
    chunk: int | None = None,
) -> Scores:
    """Those of WANTED that `want` names; nothing else is computed. `logp` needs targets.

    temperature: divides the logits, after the softcap. chunk: tokens of one device scored at a time; None chooses by
    size, 0 keeps all logits for the backward pass. A target outside the vocabulary gives a meaningless finite number,
    no error.
    """
    unknown = set(want) - set(WANTED)
    if unknown or not want:
        raise ValueError(f"want={sorted(want)} should name some of {', '.join(WANTED)}")
    if "logp" in want and targets_BT is None:
        raise ValueError("want='logp' needs targets")
    found = {}
    # The mean of linear logits needs none of them.
    linear = "mean" in want and head.softcap is None
    if linear:
        found["mean"] = _mean_of_linear(x_BTD, head, temperature)
    passed = tuple(name for name in WANTED if name in want and not (linear and name == "mean"))
    if passed:
        weight_VD, bias_V = head.arrays(x_BTD.dtype)
        layout = head_layout(x_BTD.shape[:2], weight_VD.shape, head, temperature=temperature, chunk=chunk)
        inputs = (x_BTD, weight_VD, bias_V)
        if passed == ("best",):
            inputs = jax.lax.stop_gradient(inputs)
        found |= score(layout, passed, *inputs, targets_BT if "logp" in want else None)
    return Scores(**found)


def with_logz(want: Names) -> Names:
    """`want`, and the normaliser where a gradient needs it."""
    return tuple(name for name in WANTED if name in want or (name == "logz" and _OF_SOFTMAX & set(want)))


def _mean_of_linear(x_BTD: jax.Array, head: Head, temperature: float | None) -> jax.Array:
    weight_VD, bias_V = head.arrays(x_BTD.dtype)
    mean_D = jnp.mean(weight_VD[: head.vocab_size].astype(jnp.float32), axis=0)
    mean_BT = x_BTD.astype(jnp.float32) @ mean_D
    mean_BT = mean_BT if head.scale is None else head.scale * mean_BT
    mean_BT = mean_BT if bias_V is None else mean_BT + jnp.mean(bias_V[: head.vocab_size].astype(jnp.float32))
    return mean_BT if temperature is None else mean_BT / temperature


# The gradient, written out.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def score(layout: HeadLayout, want: Names, x_BTD, weight_VD, bias_V, targets_BT):
    """{name: [B, T]}."""
    run = layout.on_mesh(
        functools.partial(_local_scores, layout, want),
        inputs=(layout.tokens, layout.weight, layout.bias, layout.tokens),
        outputs=layout.tokens,
    )
    return run(x_BTD, weight_VD, bias_V, targets_BT)


def _score_forward(layout: HeadLayout, want: Names, x_BTD, weight_VD, bias_V, targets_BT):
    inputs, kept = (x_BTD, weight_VD, bias_V, targets_BT), None
    needed = with_logz(want)
    if layout.rows:
        scores: Any = score(layout, needed, *inputs)
    else:
        run = layout.on_mesh(
            functools.partial(_local_scores_kept, layout, needed),
            inputs=(layout.tokens, layout.weight, layout.bias, layout.tokens),
            outputs=(layout.tokens, layout.products),
        )
        scores, kept = run(*inputs)
    saved = {name: scores[name] for name in ("logz", "entropy") if name in scores}
    return {name: scores[name] for name in want}, (*inputs, saved, kept)


def _score_backward(layout: HeadLayout, want: Names, residuals, cotangents):
    cotangents = {name: cotangents[name] for name in want if name != "best"}
    tokens = layout.tokens
    run = layout.on_mesh(
        functools.partial(_local_gradients, layout),
        inputs=(tokens, layout.weight, layout.bias, tokens, tokens, layout.products, tokens),
        outputs=(tokens, layout.weight, layout.bias),
    )
    return (*run(*residuals, cotangents), None)


score.defvjp(_score_forward, _score_backward)


# One device's part.


def _local_scores(layout: HeadLayout, want: Names, x_BTD, weight_VD, bias_V, targets_BT):
    weight_DW, bias_W = layout.gather(x_BTD.dtype, weight_VD, bias_V)

    def chunk(x_CD, targets_C):
        return statistics(layout, want, products(layout, x_CD, weight_DW, bias_W), targets_C)

    targets_M = None if targets_BT is None else flat(targets_BT)
    found = over_chunks(chunk, layout.rows, flat(x_BTD), targets_M)
    return combined(layout, want, found, shape=x_BTD.shape[:2])


def _local_scores_kept(layout: HeadLayout, want: Names, x_BTD, weight_VD, bias_V, targets_BT):
    """(scores, products with the head: blocks [B, T, b])."""
    weight_DW, bias_W = layout.gather(x_BTD.dtype, weight_VD, bias_V)
    blocks = products(layout, flat(x_BTD), weight_DW, bias_W)
    targets_M = None if targets_BT is None else flat(targets_BT)
    shape = x_BTD.shape[:2]
    scores = combined(layout, want, statistics(layout, want, blocks, targets_M), shape=shape)
    return scores, [product_Mb.reshape(*shape, -1) for product_Mb in blocks]


def _local_gradients(layout: HeadLayout, x_BTD, weight_VD, bias_V, targets_BT, saved, kept, cotangents):
    """Gradients of x, weight and bias from this device's tokens, summed over the mesh."""
    weight_DW, bias_W = layout.gather(x_BTD.dtype, weight_VD, bias_V)

    def gradients_of(x_CD, arrays):
        kept, targets_C, saved, cotangents = arrays
        blocks = products(layout, x_CD, weight_DW, bias_W) if kept is None else kept
        for (start, _), product_Cb in zip(layout.blocks, blocks, strict=True):
            yield logit_gradients(layout, start, product_Cb, targets_C, saved, cotangents)

    arrays = (kept, targets_BT, saved, cotangents)
    g_x_BTD, g_DW, g_W = head_gradients(layout, gradients_of, x_BTD, weight_DW, bias_W, arrays)
    return g_x_BTD, *scattered(layout, g_DW, g_W, weight_VD, bias_V)


# The formulas, for the tokens of a chunk and the blocks of columns of one device.


def _is_target(layout: HeadLayout, start: int, targets_C, columns: int):
    return (targets_C - layout.first() - start)[:, None] == jnp.arange(columns)[None, :]


def statistics(layout: HeadLayout, want: Names, blocks: list[jax.Array], targets_C) -> dict[str, Any]:
    """Of the columns of this device, in what `want` needs: top, the highest logit; total, the sum of
    e = exp(logit - top); picked, the target's logit (0 if elsewhere); weighted, the sum of e * (logit - top); sum, of
    all logits; best, the first column with the highest."""
    starts = [start for start, _ in layout.blocks]
    parts = [block_logits(layout, start, product_Cb) for start, product_Cb in zip(starts, blocks, strict=True)]
    tops = [part.max(axis=-1) for part in parts]
    top_C = functools.reduce(jnp.maximum, tops)
    found: dict[str, Any] = {"top": top_C}
    if _OF_SOFTMAX & set(want):
        found["total"] = sum(jnp.exp(part - top_C[:, None]).sum(axis=-1) for part in parts)
    if "logp" in want:
        found["picked"] = sum(
            jnp.where(_is_target(layout, start, targets_C, part.shape[1]), part, 0.0).sum(axis=-1)
            for start, part in zip(starts, parts, strict=True)
        )
    if "entropy" in want:
        below = [part - top_C[:, None] for part in parts]
        found["weighted"] = sum((jnp.exp(part) * part).sum(axis=-1) for part in below)
    if "mean" in want:
        found["sum"] = sum(
            jnp.where(is_real(layout, start, part.shape[1]), part, 0.0).sum(axis=-1)
            for start, part in zip(starts, parts, strict=True)
        )
    if "best" in want:
        bests_nC = jnp.stack([start + jnp.argmax(part, axis=-1) for start, part in zip(starts, parts, strict=True)])
        first_1C = jnp.argmax(jnp.stack(tops), axis=0)[None, :]
        found["best"] = jnp.take_along_axis(bests_nC, first_1C, axis=0)[0].astype(jnp.int32)
    return found


def combined(layout: HeadLayout, want: Names, found: dict[str, jax.Array], *, shape) -> dict[str, jax.Array]:
    """Scores from the statistics of each device's part of the vocabulary."""
    if layout.vocab_axes:
        found = _over_vocabulary(layout, found)
    scores = {}
    if "total" in found:
        scores["logz"] = found["top"] + jnp.log(found["total"])
    if "logp" in want:
        scores["logp"] = found["picked"] - scores["logz"]
    if "entropy" in want:
        scores["entropy"] = jnp.log(found["total"]) - found["weighted"] / found["total"]
    if "mean" in want:
        scores["mean"] = found["sum"] / layout.vocab_size
    if "best" in want:
        scores["best"] = found["best"]
    return {name: scores[name].reshape(shape) for name in want}


def _over_vocabulary(layout: HeadLayout, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of all columns from those of each device's."""
    top_M = found["top"]
    highest_M = jax.lax.pmax(top_M, layout.vocab_axes)
    whole, sums = {"top": highest_M}, {}
    if "total" in found:
        sums["total"] = found["total"] * jnp.exp(top_M - highest_M)
    if "weighted" in found:
        lower_M = top_M - highest_M
        sums["weighted"] = jnp.exp(lower_M) * (found["weighted"] + lower_M * found["total"])
    sums |= {name: found[name] for name in ("picked", "sum") if name in found}
    if sums:
        added = jax.lax.psum(jnp.stack(list(sums.values())), layout.vocab_axes)
        whole |= dict(zip(sums, added, strict=True))
    if "best" in found:
        best_M = jnp.where(top_M == highest_M, found["best"] + layout.first(), jnp.iinfo(jnp.int32).max)
        whole["best"] = jax.lax.pmin(best_M, layout.vocab_axes)
    return whole


def logit_gradients(layout: HeadLayout, start: int, product_Cb, targets_C, saved, g):
    """With p = softmax(l): d logp = onehot - p, d logz = p, d entropy = -p (log p + entropy), d mean = 1 / size."""
    logits_Cb = block_logits(layout, start, product_Cb)
    g_Cb: Any = 0.0
    if _OF_SOFTMAX & set(g):
        log_p_Cb = logits_Cb - saved["logz"][:, None]
        p_Cb = jnp.exp(log_p_Cb)
        zero_C = jnp.zeros_like(saved["logz"])
        g_Cb = (g.get("logz", zero_C) - g.get("logp", zero_C))[:, None] * p_Cb
        if "entropy" in g:
            g_Cb = g_Cb - g["entropy"][:, None] * (p_Cb * (log_p_Cb + saved["entropy"][:, None]))
        if "logp" in g:
            is_target_Cb = _is_target(layout, start, targets_C, product_Cb.shape[1])
            g_Cb = g_Cb + jnp.where(is_target_Cb, g["logp"][:, None], 0.0)
    if "mean" in g:
        g_mean_C1 = g["mean"][:, None] / layout.vocab_size
        g_Cb = g_Cb + jnp.where(is_real(layout, start, product_Cb.shape[1]), g_mean_C1, 0.0)
    return product_gradient(layout, product_Cb, g_Cb)
