"""The divergence between the predictions of two heads at each token, without logits of all tokens: distillation, KL.

As in token_scores.py, forward and backward are each ONE shard_map over all axes: both heads are gathered once, and the
gradient of the student's is summed in float32 and scattered once. The teacher gets no gradient. Estimates of KL from
sampled tokens alone are not here.

With p the student's probabilities and q the teacher's, per token and in nats (arXiv 2306.13649, section 2):
forward_kl: KL(q || p); reverse_kl: KL(p || q); jensen_shannon: KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2.

Legend: B batch, T length, D model (E the teacher's), V vocab (padded), M tokens of one device, W vocab of one device,
C tokens of a chunk, b columns of a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.core.errors import UsageError
from t5x_like.layers.scoring.head import Head
from t5x_like.layers.scoring.head_layout import HeadLayout, head_layout
from t5x_like.layers.scoring.products import (
    block_logits,
    flat,
    head_gradients,
    over_chunks,
    product_gradient,
    products,
    scattered,
)

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
Layouts = tuple[HeadLayout, HeadLayout]  # of student and teacher
Blocks = list[jax.Array]


def token_divergence(
    x_BTD: Float[Array, "B T D"],
    head: Head,
    x_teacher_BTE: Float[Array, "B T E"],
    head_teacher: Head,
    *,
    kind: str,
    temperature: float | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """One of KINDS, float32, differentiable by x and the head's arrays. The heads must have one vocabulary.

    temperature: divides both logits; a loss multiplies by its square (arXiv 1503.02531, section 2). chunk: as of
    `token_scores`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} should be one of {', '.join(KINDS)}")
    (weight_VD, bias_V), (weight_VE, bias_teacher_V) = (
        head.arrays(x_BTD.dtype),
        head_teacher.arrays(x_teacher_BTE.dtype),
    )
    if head.vocab_size != head_teacher.vocab_size:
        raise UsageError(
            f"the vocabularies of student and teacher have {head.vocab_size} and {head_teacher.vocab_size} tokens; "
            "a divergence needs models with the same tokenizer"
        )
    if weight_VD.shape[0] != weight_VE.shape[0]:
        raise UsageError(
            f"the heads of student and teacher have {weight_VD.shape[0]} and {weight_VE.shape[0]} rows with padding; "
            "give both models the same vocab_multiple"
        )
    layouts = tuple(
        head_layout(x_BTD.shape[:2], weight.shape, which, temperature=temperature, chunk=chunk, heads=2)
        for weight, which in ((weight_VD, head), (weight_VE, head_teacher))
    )
    if (layouts[0].tokens, layouts[0].vocab_axes) != (layouts[1].tokens, layouts[1].vocab_axes):
        raise UsageError(
            "student and teacher lie differently on the mesh; give both the same rules for batch, length and vocab"
        )
    teacher = jax.lax.stop_gradient((x_teacher_BTE, weight_VE, bias_teacher_V))
    return _divergence(layouts, kind, (x_BTD, weight_VD, bias_V), teacher)


# The gradient, written out.


def _specs(layout: HeadLayout):
    return layout.tokens, layout.weight, layout.bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergence(layouts: Layouts, kind: str, student, teacher):
    run = layouts[0].on_mesh(
        functools.partial(_local_divergence, layouts, kind),
        inputs=tuple(map(_specs, layouts)),
        outputs=(layouts[0].tokens, layouts[0].tokens),
    )
    return run(student, teacher)[0]


def _divergence_forward(layouts: Layouts, kind: str, student, teacher):
    """Kept for the backward pass: where logits are small, the gradient of the products; else what computes it anew."""
    layout = layouts[0]
    kept = layout.tokens if layout.rows else layout.products
    run = layout.on_mesh(
        functools.partial(_local_divergence, layouts, kind, keep=not layout.rows),
        inputs=tuple(map(_specs, layouts)),
        outputs=(layout.tokens, kept),
    )
    divergence_BT, saved = run(student, teacher)
    return divergence_BT, (student, teacher if layout.rows else None, saved)


def _divergence_backward(layouts: Layouts, kind: str, residuals, g_BT):
    layout, (student, teacher, saved) = layouts[0], residuals
    run = layout.on_mesh(
        functools.partial(_local_gradients, layouts, kind),
        inputs=(
            _specs(layout),
            None if teacher is None else _specs(layouts[1]),
            layout.tokens if layout.rows else layout.products,
            layout.tokens,
        ),
        outputs=_specs(layout),
    )
    return run(student, teacher, saved, g_BT), None


_divergence.defvjp(_divergence_forward, _divergence_backward)


# One device's part.


def _local_divergence(layouts: Layouts, kind: str, student, teacher, *, keep: bool = False):
    """(divergence [B, T], the gradient of its products, blocks [B, T, b], or else the statistics of each token)."""
    x_BTD, x_teacher_BTE = student[0], teacher[0]
    shape = x_BTD.shape[:2]
    heads = [layout.gather(x.dtype, *head) for layout, (x, *head) in zip(layouts, (student, teacher), strict=True)]

    def chunk(x_CD, x_teacher_CE):
        blocks = _both_products(layouts, heads, x_CD, x_teacher_CE)
        logits = _both_logits(layouts, blocks)
        logz_2C = _normalisers(layouts[0], logits)
        divergence_C, mean_C = _sums(layouts[0], kind, *_log_probs(logits, logz_2C))
        if not keep:
            return divergence_C, (*logz_2C, mean_C)
        return divergence_C, list(_slopes(layouts[0], kind, blocks[0], logits, logz_2C, mean_C))

    divergence_M, saved = over_chunks(chunk, layouts[0].rows, flat(x_BTD), flat(x_teacher_BTE))
    return divergence_M.reshape(shape), jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), saved)


def _local_gradients(layouts: Layouts, kind: str, student, teacher, saved, g_BT):
    """Gradients of the student's x, weight and bias from this device's tokens, summed over the mesh."""
    layout, (x_BTD, weight_VD, bias_V) = layouts[0], student
    head = layout.gather(x_BTD.dtype, weight_VD, bias_V)
    heads = [head] if teacher is None else [head, layouts[1].gather(teacher[0].dtype, *teacher[1:])]

    def gradients_of(x_CD, arrays):
        x_teacher_CE, saved, g_C = arrays
        slopes = saved
        if x_teacher_CE is not None:
            blocks = _both_products(layouts, heads, x_CD, x_teacher_CE)
            slopes = _slopes(layout, kind, blocks[0], _both_logits(layouts, blocks), saved[:2], saved[2])
        return (g_C[:, None] * slope_Cb for slope_Cb in slopes)

    arrays = (None if teacher is None else teacher[0], saved, g_BT)
    g_x_BTD, g_DW, g_W = head_gradients(layout, gradients_of, x_BTD, *head, arrays)
    return g_x_BTD, *scattered(layout, g_DW, g_W, weight_VD, bias_V)


# The formulas, for the tokens of a chunk and the blocks of columns of one device.


def _both_products(layouts: Layouts, heads, *xs) -> list[Blocks]:
    return [products(layout, x, *head) for layout, head, x in zip(layouts, heads, xs, strict=True)]


def _both_logits(layouts: Layouts, products_of_both: list[Blocks]) -> list[Blocks]:
    return [
        [block_logits(layout, start, block) for (start, _), block in zip(layout.blocks, blocks, strict=True)]
        for layout, blocks in zip(layouts, products_of_both, strict=True)
    ]


def _normalisers(layout: HeadLayout, logits: list[Blocks]) -> jax.Array:
    """[2, C]: log sum exp of the student's and of the teacher's logits over the whole vocabulary."""
    top_2C = jnp.stack([functools.reduce(jnp.maximum, [part.max(axis=-1) for part in parts]) for parts in logits])
    if layout.vocab_axes:
        top_2C = jax.lax.pmax(top_2C, layout.vocab_axes)
    totals = [
        sum(jnp.exp(part - top_C[:, None]).sum(axis=-1) for part in parts)
        for parts, top_C in zip(logits, top_2C, strict=True)
    ]
    return top_2C + jnp.log(_over_vocabulary(layout, jnp.stack(totals)))


def _over_vocabulary(layout: HeadLayout, values: Any) -> jax.Array:
    return jax.lax.psum(values, layout.vocab_axes) if layout.vocab_axes else values


def _log_probs(logits: list[Blocks], logz) -> list[Blocks]:
    return [[part - logz_C[:, None] for part in parts] for parts, logz_C in zip(logits, logz, strict=True)]


def _log_mean(log_p, log_q):
    return jnp.logaddexp(log_p, log_q) - math.log(2.0)


def _sums(layout: HeadLayout, kind: str, logs_p: Blocks, logs_q: Blocks) -> tuple[jax.Array, jax.Array]:
    """(divergence, the mean under p of its derivative by p, up to what is the same for all columns)."""
    divergence: Any = []
    mean: Any = []
    for log_p, log_q in zip(logs_p, logs_q, strict=True):
        if kind == "forward_kl":
            divergence.append((jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1))
        elif kind == "reverse_kl":
            divergence.append((jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        else:
            log_m = _log_mean(log_p, log_q)
            mean.append(0.5 * (jnp.exp(log_p) * (log_p - log_m)).sum(axis=-1))
            divergence.append(mean[-1] + 0.5 * (jnp.exp(log_q) * (log_q - log_m)).sum(axis=-1))
    if not mean:
        total_C = _over_vocabulary(layout, sum(divergence))
        return total_C, total_C
    both_2C = _over_vocabulary(layout, jnp.stack([sum(divergence), sum(mean)]))
    return both_2C[0], both_2C[1]


def _slopes(layout: HeadLayout, kind: str, products_p: Blocks, logits: list[Blocks], logz: Any, mean_C):
    """The gradient of the divergence by the student's products, block by block."""
    for product_Cb, log_p, log_q in zip(products_p, *_log_probs(logits, logz), strict=True):
        p_Cb = jnp.exp(log_p)
        if kind == "forward_kl":
            slope_Cb = p_Cb - jnp.exp(log_q)
        elif kind == "reverse_kl":
            slope_Cb = p_Cb * (log_p - log_q - mean_C[:, None])
        else:
            slope_Cb = p_Cb * (0.5 * (log_p - _log_mean(log_p, log_q)) - mean_C[:, None])
        yield product_gradient(layout, product_Cb, slope_Cb)
