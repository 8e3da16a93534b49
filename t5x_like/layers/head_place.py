"""Where one call of the scorer does its work: in which pieces, and how tokens and the head lie on the mesh.

It gathers the head for a device's part and scatters its gradient back. It is NOT the mathematics of scoring
(token_log_probs.py), and decides no sharding: it follows the table of axes.

Legend: B batch, T length, D model, V vocab (padded), M tokens of one device, W vocab of one device while scoring.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from t5x_like.layers.platform import platform
from t5x_like.parallel.rules import Rules

# Logits of one device up to this size are kept from the forward to the backward pass, which spares a quarter of the
# multiplications; a ~30M model with 4096 tokens a step needs 128 MiB. Larger ones are computed again, in chunks of
# tokens.
KEEP_BYTES = 256 * 2**20
# Float32 logits of a chunk: so large that the gradient of the head, which is read and written once a chunk, costs
# little beside them. Of the loss of an 8B model on v5p, halving it adds 4% of cycles, doubling it takes nothing away.
CHUNK_BYTES = 2**30
# Rows of a chunk are a multiple of this (tiles of the matrix units).
CHUNK_ROWS = 128
# On a CPU products are made in blocks of this many columns: XLA's matrix product is up to twice as fast on them as on
# the whole vocabulary (docs/log.md). At most MAX_BLOCKS of them, since their loop is unrolled.
CPU_COLUMNS, MAX_BLOCKS = 512, 16


@dataclasses.dataclass(frozen=True)
class Place:
    """What is static about one call.

    vocab_size, softcap: the head's. columns: W; padded: whether some of the vocabulary is padding; blocks: of columns,
    multiplied one by one; rows: tokens of a chunk, 0 to keep all logits. free_axes: mesh axes to map over, none without
    a mesh. token_axes: those that split tokens; vocab_axes: those that split the vocabulary while scoring; gathered:
    (dim, mesh axis) of the weight's other splits, in the order in which they are undone.
    """

    vocab_size: int
    softcap: float | None
    columns: int
    padded: bool
    blocks: tuple[tuple[int, int], ...]
    rows: int
    free_axes: tuple[str, ...] = ()
    tokens: PartitionSpec = PartitionSpec()
    weight: PartitionSpec = PartitionSpec()
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    gathered: tuple[tuple[int, str], ...] = ()

    def on_mesh(self, function: Callable[..., Any], inputs: str, outputs: str) -> Callable[..., Any]:
        """`function(place, ...)` of one device's part, as a function of the whole arrays, which `inputs` names."""
        local = functools.partial(function, self)
        if not self.free_axes:
            return local
        specs = {
            "tokens": self.tokens,  # [B, T] and [B, T, D]
            "kept": PartitionSpec(*self.tokens, self.vocab_axes or None),
            "weight": self.weight,
            "bias": PartitionSpec(*list(self.weight)[:1]),
        }
        out_specs = tuple(specs[name] for name in outputs.split())
        return jax.shard_map(
            local,
            in_specs=tuple(specs[name] for name in inputs.split()),
            out_specs=out_specs[0] if len(out_specs) == 1 else out_specs,
            axis_names=set(self.free_axes),
            check_vma=False,  # the gradient is written out, so nothing depends on its bookkeeping
        )

    def first(self) -> int | jax.Array:
        """The number in the vocabulary of this device's first column."""
        return jax.lax.axis_index(self.vocab_axes) * self.columns if self.vocab_axes else 0

    def gather(self, dtype: Any, weight_VD: jax.Array, bias_V: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The head [D, W] for the columns scored here, in the compute type, and its bias.

        Transposed first: what is split over many devices is then the slow dim, whose parts only need to be put side by
        side, and whose gradient is laid out as it is scattered.
        """
        weight_DW = weight_VD.astype(dtype).T
        for dim, name in self.gathered:
            weight_DW = jax.lax.all_gather(weight_DW, name, axis=1 - dim, tiled=True)
            if bias_V is not None and dim == 0:
                bias_V = jax.lax.all_gather(bias_V, name, axis=0, tiled=True)
        return weight_DW, bias_V

    def scatter_weight(self, gradient_DW: jax.Array) -> jax.Array:
        """The sum over all tokens of the gradient of a gathered weight, split as the weight is, [V, D]."""
        return self._scatter(gradient_DW, {0: 1, 1: 0}).T

    def scatter_bias(self, gradient_W: jax.Array) -> jax.Array:
        return self._scatter(gradient_W, {0: 0})

    def _scatter(self, gradient: jax.Array, dims: dict[int, int]) -> jax.Array:
        """dims: where the weight's dims stand in the gradient."""
        summed = set()
        for dim, name in reversed(self.gathered):
            if dim not in dims:
                continue
            if name in self.token_axes:
                gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=dims[dim], tiled=True)
                summed.add(name)
            else:  # every device along it has the same tokens, hence the same gradient
                size = gradient.shape[dims[dim]] // jax.lax.axis_size(name)
                start = jax.lax.axis_index(name) * size
                gradient = jax.lax.dynamic_slice_in_dim(gradient, start, size, dims[dim])
        rest = tuple(name for name in self.token_axes if name not in summed)
        return jax.lax.psum(gradient, rest) if rest else gradient


def place(
    tokens_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    *,
    rules: Rules | None,
    vocab_size: int,
    softcap: float | None,
    chunk: int | None,
) -> Place:
    """For tokens [B, T] and a weight [V, D] on the mesh in context. chunk: as of `token_log_probs`."""
    count, vocab = math.prod(tokens_shape), weight_shape[0]
    mesh = get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    sizes = {name: size for name, size, kind in axes if kind != AxisType.Manual}
    here = Place(vocab_size, softcap, vocab, vocab > vocab_size, _blocks(vocab), _rows(count, vocab, chunk))
    if rules is None or math.prod(sizes.values()) == 1:
        return here
    tokens = rules.spec(("batch", "length"), tokens_shape, sizes)
    weight = rules.spec(("vocab", "embed"), weight_shape, sizes)
    token_axes = tuple(name for entry in tokens for name in _names(entry))
    vocab_split, embed_split = map(_names, weight)
    kept = [name in token_axes for name in vocab_split].index(True) if set(vocab_split) & set(token_axes) else None
    # Two devices along an axis of tokens score different ones: there, and inside it, the vocabulary is gathered.
    vocab_axes, inner = vocab_split[:kept], vocab_split[kept:] if kept is not None else ()
    count //= math.prod(sizes[name] for name in token_axes)
    vocab //= math.prod(sizes[name] for name in vocab_axes)
    return dataclasses.replace(
        here,
        columns=vocab,
        blocks=_blocks(vocab),
        rows=_rows(count, vocab, chunk),
        free_axes=tuple(sizes),
        tokens=tokens,
        weight=weight,
        token_axes=token_axes,
        vocab_axes=vocab_axes,
        gathered=tuple((0, name) for name in reversed(inner)) + tuple((1, name) for name in reversed(embed_split)),
    )


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _rows(tokens: int, vocab: int, chunk: int | None) -> int:
    size = 4 * tokens * vocab
    if chunk is None and size > KEEP_BYTES:
        rows = math.ceil(tokens / math.ceil(size / CHUNK_BYTES))
        chunk = math.ceil(rows / CHUNK_ROWS) * CHUNK_ROWS
    return min(chunk or 0, tokens)


def _blocks(vocab: int) -> tuple[tuple[int, int], ...]:
    """(start, end) of blocks of columns."""
    width = vocab if platform() != "cpu" else max(CPU_COLUMNS, math.ceil(vocab / MAX_BLOCKS))
    return tuple((start, min(start + width, vocab)) for start in range(0, vocab, width))
