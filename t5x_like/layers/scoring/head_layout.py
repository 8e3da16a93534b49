"""How one call of the scorer is divided: into chunks of tokens and blocks of columns, and over the devices of a mesh.

It gathers the head for a device's part and scatters its gradient back. It is NOT the mathematics of scoring
(products.py, token_scores.py), and decides no sharding: it follows the table of axes.

An example: a mesh fsdp 4 x tensor 2, hidden states [B=8, T=6, D=16] and a head [V=256, D=16], with the usual table
(batch on fsdp, vocab on tensor, embed on fsdp).

  holds     2 rows, M = 12 tokens: fsdp splits the rows, and both devices of a tensor pair have the same ones. Of the
            head a part [128, 4]: tensor splits V, fsdp splits D.
  gathers   along D over fsdp, the head [D=16, W=128] in the compute type: all that its W columns need. V stays split,
            since the two devices of a tensor pair score the same tokens: each scores W = 128 columns of them, and
            maxima and sums of M numbers are combined over tensor.
  scatters  in the backward pass the gradient [16, 128], summed in float32 over its 12 tokens. One reduce-scatter over
            fsdp adds those of the 4 groups of tokens and leaves each device its part [128, 4].

Here token_axes = (fsdp,), vocab_axes = (tensor,) and gathered = ((1, fsdp),). Were V on tensor and fsdp, it would be
gathered over fsdp, along which devices have different tokens: gathered = ((0, fsdp),), and W again 128.

Legend: B batch, T length, D model, V vocab (padded), M tokens of one device, W vocab of one device while scoring.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from t5x_like.layers.platform import platform
from t5x_like.layers.scoring.head import Head
from t5x_like.parallel.sharding import free_axis_sizes, spec_names

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
class HeadLayout:
    """What is static about one call for one head. The defaults are those of one device.

    vocab_size, softcap, scale: the head's. temperature: divides its logits after the softcap. columns: W; padded:
    whether some of the vocabulary is padding; blocks: of columns, multiplied one by one; rows: tokens of a chunk, 0 to
    keep all logits. mesh_axes: those to map over, none without a mesh. tokens, weight: where [B, T, ...] and [V, D]
    lie. token_axes: mesh axes that split tokens; vocab_axes: those that split the vocabulary while scoring; gathered:
    (dim, mesh axis) of the weight's other splits, in the order in which they are undone.
    """

    vocab_size: int
    softcap: float | None
    scale: float | None
    temperature: float | None
    columns: int
    padded: bool
    blocks: tuple[tuple[int, int], ...]
    rows: int
    mesh_axes: tuple[str, ...] = ()
    tokens: PartitionSpec = PartitionSpec()
    weight: PartitionSpec = PartitionSpec()
    token_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    gathered: tuple[tuple[int, str], ...] = ()

    @property
    def bias(self) -> PartitionSpec:
        """Where [V] lies."""
        return PartitionSpec(*self.weight[:1])

    @property
    def products(self) -> PartitionSpec:
        """Where [B, T, columns] lies."""
        return PartitionSpec(*self.tokens, self.vocab_axes or None)

    def on_mesh(self, function: Callable[..., Any], *, inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`function`, which computes one device's part, as a function of whole arrays that lie as the specs say."""
        if not self.mesh_axes:
            return function
        return jax.shard_map(
            function,
            in_specs=inputs,
            out_specs=outputs,
            axis_names=set(self.mesh_axes),
            check_vma=False,  # the gradient is written out, so nothing depends on its bookkeeping
        )

    def first(self) -> int | jax.Array:
        """The number in the vocabulary of this device's first column."""
        return jax.lax.axis_index(self.vocab_axes) * self.columns if self.vocab_axes else 0

    def gather(self, dtype: Any, weight_VD: jax.Array, bias_V: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The head [D, W] for the columns of this device, in the compute type, and its bias.

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

    def scatter_columns(self, gradient_bD: jax.Array) -> jax.Array:
        """The same of the gradient of some columns [b, D], or of all where the vocabulary is gathered."""
        return self._scatter(gradient_bD, {0: 0, 1: 1})

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


def head_layout(
    tokens_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    head: Head,
    *,
    temperature: float | None,
    chunk: int | None,
    heads: int = 1,
) -> HeadLayout:
    """For tokens [B, T] and a weight [V, D] on the mesh in context.

    chunk: as of `token_scores`. heads: how many logits of this size are held at once.
    """
    count, vocab = math.prod(tokens_shape), weight_shape[0]
    layout = HeadLayout(
        head.vocab_size,
        head.softcap,
        head.scale,
        temperature,
        columns=vocab,
        padded=vocab > head.vocab_size,
        blocks=_blocks(vocab),
        rows=_rows(count, heads * vocab, chunk),
    )
    sizes = free_axis_sizes()
    if head.rules is None or math.prod(sizes.values()) == 1:
        return layout
    tokens = head.rules.spec(("batch", "length"), tokens_shape, sizes)
    weight = head.rules.spec(("vocab", "embed"), weight_shape, sizes)
    token_axes = tuple(name for entry in tokens for name in spec_names(entry))
    vocab_split, embed_split = map(spec_names, weight)
    vocab_axes, vocab_gathered = _divided(vocab_split, token_axes)
    count //= math.prod(sizes[name] for name in token_axes)
    vocab //= math.prod(sizes[name] for name in vocab_axes)
    return dataclasses.replace(
        layout,
        columns=vocab,
        blocks=_blocks(vocab),
        rows=_rows(count, heads * vocab, chunk),
        mesh_axes=tuple(sizes),
        tokens=tokens,
        weight=weight,
        token_axes=token_axes,
        vocab_axes=vocab_axes,
        gathered=tuple((0, name) for name in reversed(vocab_gathered))
        + tuple((1, name) for name in reversed(embed_split)),
    )


def _divided(vocab_split: tuple[str, ...], token_axes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(mesh axes over which the vocabulary stays split while scoring, those over which it is gathered).

    Devices along an axis of tokens score different tokens, so each of them needs the columns of all: it is gathered.
    So is every axis after it, since a device's columns must stand side by side.
    """
    first = next((index for index, name in enumerate(vocab_split) if name in token_axes), len(vocab_split))
    return vocab_split[:first], vocab_split[first:]


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
