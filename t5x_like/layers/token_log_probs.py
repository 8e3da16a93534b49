"""The one scorer: log-probabilities of given tokens from hidden states and a head, without full float32 logits.

`token_log_probs` serves every objective and evaluation, as its cotangents are per token. It is NOT a loss: weights,
label smoothing, z-loss and sums belong to objectives. `logits` is for decoding a few positions.

On a mesh, forward and backward are each ONE shard_map over all axes: the head is gathered once, in compute type, each
device scores its own tokens chunk by chunk, and the gradient of the head is summed in float32 and scattered once. Left
to the compiler, the head would be gathered, and its gradient reduced, once a chunk.

Legend: B batch, T length, D model, V vocab (padded), M tokens of one device, C tokens of a chunk, n chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int

from t5x_like.layers import weights
from t5x_like.parallel.rules import Rules

# Logits of one device up to this size are kept from the forward to the backward pass, which spares a quarter of the
# multiplications; a ~30M model with 4096 tokens a step needs 128 MiB. Larger ones are computed again.
KEEP_BYTES = 256 * 2**20
# Otherwise the float32 logits of one chunk have this size: enough for the matrix unit, and for the gradient of the
# head, which is read and written once a chunk, to cost little beside them.
CHUNK_BYTES = 512 * 2**20
# Rows of a chunk are a multiple of this (tiles of the matrix units).
CHUNK_ROWS = 128
# The logit of padding: far below every other, and finite, so that inf - inf never arises.
MASKED = -1e30


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
    weight_VD, bias_V = _dense(head.weight), _dense(head.bias)
    logits_BTV = _capped(_product(x_BTD, weight_VD.astype(x_BTD.dtype), bias_V), head.softcap)
    real_V = jnp.arange(logits_BTV.shape[-1]) < head.vocab_size
    return jnp.where(real_V[None, None, :], logits_BTV, -jnp.inf)


def token_log_probs(
    x_BTD: Float[Array, "B T D"], head: Head, targets_BT: Int[Array, "B T"], *, chunk: int | None = None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probability of each target, log of the normaliser), float32.

    chunk: tokens of one device scored at a time; None chooses by size, 0 keeps all logits for the backward pass. A
    target outside the vocabulary gives a large negative number, no error.
    """
    weight_VD, bias_V = _dense(head.weight), _dense(head.bias)
    plan = _plan(x_BTD, weight_VD, head, chunk)
    return _score(plan, x_BTD, weight_VD, bias_V, targets_BT)


def token_predictions(x_BTD: Float[Array, "B T D"], head: Head) -> Int[Array, "B T"]:
    """The most probable token at each position (the lowest id among equals)."""
    weight_VD, bias_V = _dense(head.weight), _dense(head.bias)
    plan = _plan(x_BTD, weight_VD, head, None)
    return plan.on_mesh(_local_predictions, "tokens weight bias", "tokens")(x_BTD, weight_VD, bias_V)


def _dense(leaf: Any) -> Any:
    """The [V, D] array of a head's weight: the one place where a leaf that is no array will be dealt with."""
    return None if leaf is None else weights.value(leaf)


# How the work is laid out.


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about one call: the head's numbers, the size of a chunk, and who holds what on the mesh.

    rows: tokens of a chunk; 0 keeps all logits. free_axes: axes to map over, none without a mesh. token_axes: those
    that split tokens; vocab_axes: those that split the vocabulary while scoring; gathered: (dim, mesh axis) of the
    weight's other splits, in the order in which they are undone.
    """

    vocab_size: int
    softcap: float | None
    rows: int
    free_axes: tuple[str, ...] = ()
    tokens: PartitionSpec = PartitionSpec()
    weight: PartitionSpec = PartitionSpec()
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    gathered: tuple[tuple[int, str], ...] = ()

    def on_mesh(self, function: Callable[..., Any], inputs: str, outputs: str) -> Callable[..., Any]:
        """`function(plan, ...)` of one device's part, as a function of the whole arrays, which `inputs` names."""
        local = functools.partial(function, self)
        if not self.free_axes:
            return local
        specs = {
            "tokens": self.tokens,  # [B, T] and [B, T, D]
            "kept": PartitionSpec(*self.tokens, self.vocab_axes or None),
            "weight": self.weight,
            "bias": PartitionSpec(self.weight[0]),
        }
        out_specs: Any = tuple(specs[name] for name in outputs.split())
        return jax.shard_map(
            local,
            in_specs=tuple(specs[name] for name in inputs.split()),
            out_specs=out_specs if len(out_specs) > 1 else out_specs[0],
            axis_names=set(self.free_axes),
            check_vma=False,  # the gradient is written out below, so nothing depends on its bookkeeping
        )


def _plan(x_BTD: jax.Array, weight_VD: jax.Array, head: Head, chunk: int | None) -> _Plan:
    (rows, length, _), vocab = x_BTD.shape, weight_VD.shape[0]
    sizes = _free_sizes()
    if head.rules is None or math.prod(sizes.values()) == 1:
        return _Plan(head.vocab_size, head.softcap, _chunk_rows(rows * length, vocab, chunk))
    tokens = head.rules.spec(("batch", "length"), (rows, length), sizes)
    weight = head.rules.spec(("vocab", "embed"), weight_VD.shape, sizes)
    token_axes = tuple(name for entry in tokens for name in _names(entry))
    vocab_split, embed_split = map(_names, weight)
    vocab_axes: tuple[str, ...] = ()
    for name in vocab_split:
        if name in token_axes:  # two devices along it score different tokens; what lies inside it is gathered as well
            break
        vocab_axes += (name,)
    inner = vocab_split[len(vocab_axes) :]
    gathered = tuple((0, name) for name in reversed(inner)) + tuple((1, name) for name in reversed(embed_split))
    tokens_here = rows * length // math.prod(sizes[name] for name in token_axes)
    vocab_here = vocab // math.prod(sizes[name] for name in vocab_axes)
    return _Plan(
        vocab_size=head.vocab_size,
        softcap=head.softcap,
        rows=_chunk_rows(tokens_here, vocab_here, chunk),
        free_axes=tuple(sizes),
        tokens=tokens,
        weight=weight,
        token_axes=token_axes,
        vocab_axes=vocab_axes,
        gathered=gathered,
    )


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _free_sizes() -> dict[str, int]:
    """The axes of the mesh in context that no enclosing shard_map handles, with their sizes."""
    mesh = get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def _chunk_rows(tokens: int, vocab: int, chunk: int | None) -> int:
    if chunk is not None:
        return min(chunk, tokens)
    size = 4 * tokens * vocab
    if size <= KEEP_BYTES:
        return 0
    rows = math.ceil(tokens / math.ceil(size / CHUNK_BYTES))
    return min(math.ceil(rows / CHUNK_ROWS) * CHUNK_ROWS, tokens)


# The gradient, written out.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(plan: _Plan, x_BTD, weight_VD, bias_V, targets_BT):
    run = plan.on_mesh(_local_scores, "tokens weight bias tokens", "tokens tokens")
    return run(x_BTD, weight_VD, bias_V, targets_BT)


def _score_forward(plan: _Plan, x_BTD, weight_VD, bias_V, targets_BT):
    inputs = (x_BTD, weight_VD, bias_V, targets_BT)
    if plan.rows:
        scores: Any = _score(plan, *inputs)
        logp_BT, logz_BT = scores
        return (logp_BT, logz_BT), (*inputs, logz_BT, None)
    run = plan.on_mesh(_local_scores_kept, "tokens weight bias tokens", "tokens tokens kept")
    logp_BT, logz_BT, kept_BTV = run(*inputs)
    return (logp_BT, logz_BT), (*inputs, logz_BT, kept_BTV)


def _score_backward(plan: _Plan, saved, cotangents):
    inputs = "tokens weight bias tokens tokens kept tokens tokens"
    run = plan.on_mesh(_local_gradients, inputs, "tokens weight bias")
    return (*run(*saved, *cotangents), None)


_score.defvjp(_score_forward, _score_backward)


# One device's part.


def _local_scores(plan: _Plan, x_BTD, weight_VD, bias_V, targets_BT):
    """(logp, logz) of the tokens here."""
    weight_VD, bias_V = _gather(plan, weight_VD.astype(x_BTD.dtype), bias_V)

    def chunk(x_CD, targets_C):
        return _statistics(plan, _product(x_CD, weight_VD, bias_V), targets_C)

    top_M, total_M, picked_M = _over_chunks(chunk, plan.rows, _flat(x_BTD), _flat(targets_BT))
    return _combine(plan, top_M, total_M, picked_M, targets_BT.shape)


def _local_scores_kept(plan: _Plan, x_BTD, weight_VD, bias_V, targets_BT):
    """(logp, logz, products with the head [B, T, V]) of the tokens here."""
    weight_VD, bias_V = _gather(plan, weight_VD.astype(x_BTD.dtype), bias_V)
    product_MV = _product(_flat(x_BTD), weight_VD, bias_V)
    logp_BT, logz_BT = _combine(plan, *_statistics(plan, product_MV, _flat(targets_BT)), targets_BT.shape)
    return logp_BT, logz_BT, product_MV.reshape(*targets_BT.shape, -1)


def _local_gradients(plan: _Plan, x_BTD, weight_VD, bias_V, targets_BT, logz_BT, kept_BTV, g_logp_BT, g_logz_BT):
    """Gradients of x, weight and bias from this device's tokens, summed over the mesh."""
    gathered: Any = _gather(plan, weight_VD.astype(x_BTD.dtype), bias_V)
    full_VD, full_V = gathered

    def chunk(sums, slices):
        x_CD, targets_C, logz_C, g_logp_C, g_logz_C, product_CV = slices
        if product_CV is None:
            product_CV = _product(x_CD, full_VD, full_V)
        g_CV = _product_gradient(plan, product_CV, targets_C, logz_C, g_logp_C, g_logz_C)
        g_V = None if bias_V is None else g_CV.sum(axis=0)
        g_CV = g_CV.astype(x_CD.dtype)  # as every cotangent of a matrix product; the sums below are in float32
        g_x_CD = jnp.einsum("CV,VD->CD", g_CV, full_VD, preferred_element_type=jnp.float32)
        g_VD = jnp.einsum("CV,CD->VD", g_CV, x_CD, preferred_element_type=jnp.float32)
        new = (g_VD, g_V)
        return new if sums is None else jax.tree.map(jnp.add, sums, new), g_x_CD.astype(x_CD.dtype)

    kept_MV = None if kept_BTV is None else _flat(kept_BTV)
    arrays: Any = (*map(_flat, (x_BTD, targets_BT, logz_BT, g_logp_BT, g_logz_BT)), kept_MV)
    tokens = arrays[0].shape[0]
    sums: Any
    if plan.rows in range(1, tokens):
        none = (jnp.zeros(full_VD.shape, jnp.float32), None if bias_V is None else jnp.zeros(full_V.shape, jnp.float32))
        sums, g_x_nCD = jax.lax.scan(chunk, none, jax.tree.map(functools.partial(_cut, plan.rows), arrays))
        g_x_MD = _joined(g_x_nCD, tokens)
    else:
        sums, g_x_MD = chunk(None, arrays)
    if plan.vocab_axes:
        g_x_MD = jax.lax.psum(g_x_MD, plan.vocab_axes)
    g_VD, g_V = sums
    g_VD = _scatter(plan, g_VD).astype(weight_VD.dtype)
    g_V = None if bias_V is None else _scatter(plan, g_V).astype(bias_V.dtype)
    return g_x_MD.reshape(x_BTD.shape), g_VD, g_V


def _local_predictions(plan: _Plan, x_BTD, weight_VD, bias_V):
    weight_VD, bias_V = _gather(plan, weight_VD.astype(x_BTD.dtype), bias_V)
    first = _first_column(plan, weight_VD.shape[0])

    def chunk(x_CD):
        logits_CV = _masked(plan, _capped(_product(x_CD, weight_VD, bias_V), plan.softcap))
        return logits_CV.max(axis=-1), first + jnp.argmax(logits_CV, axis=-1).astype(jnp.int32)

    top_M, best_M = _over_chunks(chunk, plan.rows, _flat(x_BTD))
    if plan.vocab_axes:
        highest_M = jax.lax.pmax(top_M, plan.vocab_axes)
        best_M = jax.lax.pmin(jnp.where(top_M == highest_M, best_M, jnp.iinfo(jnp.int32).max), plan.vocab_axes)
    return best_M.reshape(x_BTD.shape[:2])


# The formulas, for [tokens, vocabulary].


def _product(x_CD, weight_VD, bias_V):
    product_CV = jnp.einsum("...D,VD->...V", x_CD, weight_VD, preferred_element_type=jnp.float32)
    if bias_V is None:
        return product_CV
    return product_CV + jnp.expand_dims(bias_V.astype(jnp.float32), tuple(range(product_CV.ndim - 1)))


def _capped(product, softcap: float | None):
    return product if softcap is None else softcap * jnp.tanh(product / softcap)


def _masked(plan: _Plan, logits_CV):
    """Padding of the vocabulary set to MASKED."""
    columns_1V = _first_column(plan, logits_CV.shape[1]) + jnp.arange(logits_CV.shape[1])[None, :]
    return jnp.where(columns_1V < plan.vocab_size, logits_CV, MASKED)


def _statistics(plan: _Plan, product_CV, targets_C):
    """Of the columns here: the highest logit, the sum of exp(logit - highest), the target's logit (0 if elsewhere)."""
    logits_CV = _masked(plan, _capped(product_CV, plan.softcap))
    top_C = logits_CV.max(axis=-1)
    total_C = jnp.exp(logits_CV - top_C[:, None]).sum(axis=-1)
    picked_C = jnp.where(_is_target(plan, targets_C, logits_CV.shape[1]), logits_CV, 0.0).sum(axis=-1)
    return top_C, total_C, picked_C


def _product_gradient(plan: _Plan, product_CV, targets_C, logz_C, g_logp_C, g_logz_C):
    """With logp = logit[target] - logz: d logp = onehot - softmax, d logz = softmax."""
    capped_CV = _capped(product_CV, plan.softcap)
    softmax_CV = jnp.exp(_masked(plan, capped_CV) - logz_C[:, None])
    onehot_CV = jnp.where(_is_target(plan, targets_C, product_CV.shape[1]), g_logp_C[:, None], 0.0)
    g_CV = (g_logz_C - g_logp_C)[:, None] * softmax_CV + onehot_CV
    if plan.softcap is None:
        return g_CV
    return g_CV * (1.0 - jnp.square(capped_CV / plan.softcap))  # d tanh = 1 - tanh^2


def _is_target(plan: _Plan, targets_C, columns: int):
    return (targets_C - _first_column(plan, columns))[:, None] == jnp.arange(columns)[None, :]


# Over the mesh.


def _first_column(plan: _Plan, columns: int):
    """The number in the vocabulary of the first of `columns` columns held here."""
    return jax.lax.axis_index(plan.vocab_axes) * columns if plan.vocab_axes else 0


def _combine(plan: _Plan, top_M, total_M, picked_M, shape):
    """(logp, logz) from the statistics of each part of the vocabulary."""
    if plan.vocab_axes:
        highest_M = jax.lax.pmax(top_M, plan.vocab_axes)
        sums_2M = jnp.stack([total_M * jnp.exp(top_M - highest_M), picked_M])
        total_M, picked_M = jax.lax.psum(sums_2M, plan.vocab_axes)
        top_M = highest_M
    logz_M = top_M + jnp.log(total_M)
    return (picked_M - logz_M).reshape(shape), logz_M.reshape(shape)


def _gather(plan: _Plan, weight_VD, bias_V):
    """Undoes the splits of the head that scoring does not want."""
    for dim, name in plan.gathered:
        weight_VD = jax.lax.all_gather(weight_VD, name, axis=dim, tiled=True)
        if bias_V is not None and dim == 0:
            bias_V = jax.lax.all_gather(bias_V, name, axis=0, tiled=True)
    return weight_VD, bias_V


def _scatter(plan: _Plan, gradient):
    """The sum over all tokens of the gradient of a gathered weight or bias, split again as the weight is."""
    summed = set()
    for dim, name in reversed(plan.gathered):
        if dim >= gradient.ndim:
            continue  # a bias has no second dim
        if name in plan.token_axes:
            gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=dim, tiled=True)
            summed.add(name)
        else:  # every device along it has the same tokens, hence the same gradient
            size = gradient.shape[dim] // jax.lax.axis_size(name)
            gradient = jax.lax.dynamic_slice_in_dim(gradient, jax.lax.axis_index(name) * size, size, dim)
    rest = tuple(name for name in plan.token_axes if name not in summed)
    return jax.lax.psum(gradient, rest) if rest else gradient


# Chunks of tokens.


def _flat(array):
    return array.reshape(-1, *array.shape[2:])


def _cut(rows: int, array):
    """[M, ...] as [n, rows, ...], filled up with zeros: tokens whose cotangent is zero."""
    count = math.ceil(array.shape[0] / rows)
    padding = [(0, count * rows - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(count, rows, *array.shape[1:])


def _joined(array, tokens: int):
    return array.reshape(-1, *array.shape[2:])[:tokens]


def _over_chunks(function: Callable[..., Any], rows: int, *arrays):
    tokens = arrays[0].shape[0]
    if rows not in range(1, tokens):
        return function(*arrays)
    results = jax.lax.map(lambda slices: function(*slices), [_cut(rows, array) for array in arrays])
    return jax.tree.map(lambda array: _joined(array, tokens), results)
