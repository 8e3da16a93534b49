"""Flash attention kernels of accelerators: splash (Pallas) on TPU, cuDNN on GPU, each inside ONE shard_map.

Both are libraries' kernels; this file says when one can run, hands it the mask in its own words, and places the work:
rows over the batch axes, heads over theirs, queries over the sequence axes with the keys of the whole row gathered;
which queries a shard has of a causal row is in splash_mask.py. It is NOT the choice between paths (choice.py) and holds
no mathematics of its own.

Legend: B batch, T query length, S key length, N heads, K kv heads, H head size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash_library
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh

from t5x_like.core.errors import UsageError
from t5x_like.layers.attention import biases, blockwise, splash_mask
from t5x_like.layers.attention.biases import Bias
from t5x_like.layers.attention.masks import MaskSpec, allowed
from t5x_like.parallel.sharding import activation_spec, free_axis_sizes, spec_names

# Rows of queries and of keys that a TPU core holds at once unless somebody says otherwise, and of keys in one product.
# Longer blocks mean fewer passes over keys and values and larger products, and more computed for nothing where a mask
# cuts them; logits of a block are float32 in VMEM (16 MiB). LANES is the kernel's least.
BLOCK = 1024
BLOCK_COMPUTE = 512
LANES = 128
# By this name remat can save what attention gives, and with it what a kernel's backward pass reads.
CONTEXT = "context"
# cuDNN's largest head: on every generation, and from Hopper on.
CUDNN_HEAD, CUDNN_HEAD_HOPPER, HOPPER = 128, 256, 9.0
# cuDNN knows no segments: it takes a mask as a 16-bit matrix [rows, T, S] (and returns one as its gradient). A device
# makes it whole up to this size, else in blocks of queries, one kernel call each; more blocks take longer to compile.
MASK_BYTES, CUDNN_BLOCK, MAX_CUDNN_BLOCKS = 64 * 2**20, 128, 32
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax's primitive; under another name it would run twice


# TPU.


def why_not_splash(q_BTNH: Any, k_BSKH: Any, mask: MaskSpec, *, bias: bool) -> str:
    """The reason why splash cannot compute this, in words; empty if it can."""
    length, k_length = q_BTNH.shape[1], k_BSKH.shape[1]
    if bias:
        return "a position bias"
    if mask.k_prefix_BS is not None:
        return "a prefix that all queries see"
    if not mask.by_index:
        return "positions are given"
    if not mask.static_window:
        return "the window is traced"
    if length != k_length:
        return f"{length} queries and {k_length} keys"
    tile = LANES * _place(q_BTNH, k_BSKH).shards(1)
    return f"length {length} is no multiple of {tile}" if length % tile else ""


def splash(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    *,
    scale: float,
    softcap: float | None,
    block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention. block: of queries and keys, made smaller where a row does not divide. interpret: runs on any
    platform, slowly, for tests."""
    place = _place(q_BTNH, k_BSKH)
    alike = mask.q_segments_BT is mask.k_segments_BS
    shards, length = place.shards(1), q_BTNH.shape[1]
    exchanged = splash_mask.exchanges(mask, length, shards=shards, multiple=LANES)
    one_head = splash_mask.block_mask(mask, length, shards=shards, exchanged=exchanged)
    kernel = splash_library.make_splash_mha(
        splash_library.MultiHeadMask([one_head] * q_BTNH.shape[2]),
        head_shards=place.shards(2),
        q_seq_shards=shards,
        block_sizes=block_sizes(length // shards // (2 if exchanged else 1), block),
        attn_logits_soft_cap=softcap,
        # Names what its backward pass reads, the output and the log sums: from outside only the output has a name, and
        # then a backward pass that finds it saved still runs the forward kernel again for the sums.
        residual_checkpoint_name=CONTEXT,
        interpret=interpret,
    )

    def exchange(x_BT):
        return splash_mask.exchange(x_BT, place.axes(1), shards) if exchanged else x_BT

    def local(q_BTNH, k_BSKH, v_BSKH, mask, kernel, q_start):
        del q_start  # each shard's kernel knows which queries it has
        q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (exchange(q_BTNH * scale), k_BSKH, v_BSKH))
        q_BNTH = checkpoint_name(q_BNTH, "q")  # as the kernel wants it
        segments = None
        if mask.q_segments_BT is not None:
            segments = splash_library.SegmentIds(q=exchange(mask.q_segments_BT), kv=mask.k_segments_BS)
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
        return _without_blind(exchange(out_BNTH.transpose(0, 2, 1, 3)), mask, alike=alike)

    kernel_spec = None
    if place.mapped:
        # The kernel's tables of blocks, cut by head and by query.
        sharding = NamedSharding(place.mesh, PartitionSpec(place.q_spec[2], place.q_spec[1]))
        kernel_spec = kernel.manual_sharding_spec(sharding)
    return place.run(local, q_BTNH, k_BSKH, v_BSKH, mask, kernel, kernel_spec)


def block_sizes(length: int, block: int) -> splash_library.BlockSizes:
    """The blocks of the three kernels. length: tokens that they divide, a multiple of LANES; block: the largest.

    >>> block_sizes(4096, 1024).block_q, block_sizes(4096, 256).block_kv_dq, block_sizes(1152, 1024).block_q
    (1024, 256, 384)
    """

    def divisor(limit: int) -> int:
        return max(size for size in range(LANES, limit + 1, LANES) if length % size == 0)

    block, compute = divisor(block), divisor(min(BLOCK_COMPUTE, block))
    block = block if block % compute == 0 else compute
    return splash_library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=compute,
    )


# GPU.


def why_not_cudnn(
    q_BTNH: Any, k_BSKH: Any, mask: MaskSpec, *, softcap: bool, bias: bool, compute_capability: float | None
) -> str:
    """The reason why cuDNN's flash attention cannot compute this, in words; empty if it can."""
    length, head = q_BTNH.shape[1], q_BTNH.shape[3]
    largest = CUDNN_HEAD_HOPPER if (compute_capability or 0.0) >= HOPPER else CUDNN_HEAD
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or k_BSKH.dtype != q_BTNH.dtype:
        return f"{jnp.dtype(q_BTNH.dtype).name} is no 16-bit type"
    if softcap:
        return "a softcap"
    if head % 8 or head > largest:
        return f"head size {head} is no multiple of 8 up to {largest}"
    if length == 1:
        return "one query"
    if bias and not _in_kernel(q_BTNH, k_BSKH, mask):
        # Their sum would have a row for each row of the batch, for which cuDNN gives no gradient.
        return "a position bias beside a mask that is a matrix"
    if (bias or not _in_kernel(q_BTNH, k_BSKH, mask)) and (length % 2 or k_BSKH.shape[1] % 2):
        what = "a position bias" if bias else "a mask that is a matrix"
        return f"{what}, and {length} queries and {k_BSKH.shape[1]} keys are not even"
    return ""


def cudnn_blocks(q_BTNH: Any, k_BSKH: Any, mask: MaskSpec) -> int:
    """In how many blocks of queries cuDNN computes this: 1 if it knows the mask, or if the matrix is small.

    >>> q = k = jax.ShapeDtypeStruct((8, 8192, 8, 128), jnp.bfloat16)
    >>> packed = MaskSpec(causal=True, q_segments_BT=jnp.ones((8, 8192), int), k_segments_BS=jnp.ones((8, 8192), int))
    >>> cudnn_blocks(q, k, MaskSpec(causal=True)), cudnn_blocks(q, k, packed)
    (1, 16)
    """
    if _in_kernel(q_BTNH, k_BSKH, mask):
        return 1
    place = _place(q_BTNH, k_BSKH)
    rows, length = (q_BTNH.shape[dim] // place.shards(dim) for dim in (0, 1))
    wanted = -(-2 * rows * length * k_BSKH.shape[1] // MASK_BYTES)
    return min(wanted, MAX_CUDNN_BLOCKS, -(-length // CUDNN_BLOCK))


def _in_kernel(q_BTNH: Any, k_BSKH: Any, mask: MaskSpec) -> bool:
    """Whether cuDNN knows all of this mask, so that no matrix is made."""
    plain = not mask.causal and mask.window is None
    return mask.by_index and mask.q_segments_BT is None and (plain or _causal_in_kernel(q_BTNH, k_BSKH, mask))


def _causal_in_kernel(q_BTNH: Any, k_BSKH: Any, mask: MaskSpec) -> bool:
    known = mask.causal and mask.by_index and mask.static_window and mask.k_prefix_BS is None
    return known and _place(q_BTNH, k_BSKH).shards(1) == 1 and q_BTNH.shape[1] == k_BSKH.shape[1]


def cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: MaskSpec,
    *,
    scale: float,
    bias: Bias | None = None,
) -> jax.Array:
    """cuDNN flash attention. Causality and windows are in the kernel; all else is a matrix, shared by heads, and for
    one block of queries after the other where the whole would be large."""
    place = _place(q_BTNH, k_BSKH)
    alike = mask.q_segments_BT is mask.k_segments_BS
    causal = _causal_in_kernel(q_BTNH, k_BSKH, mask)
    blocks = cudnn_blocks(q_BTNH, k_BSKH, mask)

    def local(q_BTNH, k_BSKH, v_BSKH, mask, bias, q_start):
        if blocks > 1:
            return _cudnn_in_blocks(q_BTNH, k_BSKH, v_BSKH, mask, q_start, blocks=blocks, scale=scale, alike=alike)
        rest = dataclasses.replace(mask, causal=False, window=None) if causal else mask
        matrix_BTS = allowed(rest, q_length=q_BTNH.shape[1], k_length=k_BSKH.shape[1], q_start=q_start)
        bias_1NTS = None
        if bias is not None:  # in the type of the queries, which cuDNN demands
            bias_1NTS = biases.by_index(bias, q_BTNH.shape[1], k_BSKH.shape[1], q_start=q_start).astype(q_BTNH.dtype)
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            bias=bias_1NTS,
            mask=None if matrix_BTS is None else matrix_BTS[:, None, :, :],
            scale=scale,
            is_causal=causal,
            local_window_size=(mask.window - 1, 0) if causal and mask.window is not None else None,
            implementation="cudnn",
        )
        return _without_blind(out_BTNH, mask, alike=alike)

    bias_specs = None if bias is None else bias.specs(place.q_spec[2])
    return place.run(local, q_BTNH, k_BSKH, v_BSKH, mask, bias, bias_specs)


def _cudnn_in_blocks(
    q_BTNH, k_BSKH, v_BSKH, mask: MaskSpec, q_start: Any, *, blocks: int, scale: float, alike: bool
) -> jax.Array:
    """One call for each block of queries, with the keys that it may see and the matrix of that part of the mask. The
    backward pass makes the matrices again; the kernel's own results are kept."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    size = -(-T // blocks // CUDNN_BLOCK) * CUDNN_BLOCK
    dtype = q_BTNH.dtype
    # Gradients of the keys are the sum over blocks: in float32, the type of what is cut here.
    k_BSKH, v_BSKH = (x.astype(jnp.float32) for x in (k_BSKH, v_BSKH))

    @functools.partial(jax.checkpoint, policy=lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD)
    def one(q_BTNH, k_BSKH, v_BSKH, mask, q_start, k_start):
        matrix_BTS = allowed(mask, q_length=q_BTNH.shape[1], k_length=k_BSKH.shape[1], q_start=q_start, k_start=k_start)
        out_BTNH = jax.nn.dot_product_attention(
            q_BTNH,
            k_BSKH.astype(dtype),
            v_BSKH.astype(dtype),
            mask=None if matrix_BTS is None else matrix_BTS[:, None, :, :],
            scale=scale,
            implementation="cudnn",
        )
        return _without_blind(out_BTNH, mask, alike=alike)

    outs = []
    for start in range(0, T, size):
        # Which keys a block may see is known where the order of keys is, and this is the whole row.
        known = mask.by_index and mask.static_window and mask.k_prefix_BS is None and isinstance(q_start, int)
        end = min(start + size, T)
        q, keys = (
            slice(start, end),
            blockwise.keys_of(start, end, S, mask.causal, mask.window) if known else slice(0, S),
        )
        arrays = mask.part(q, keys)
        if outs:  # one matrix at a time: this block's is not begun before the last block is done
            arrays, _ = jax.lax.optimization_barrier((arrays, jax.lax.stop_gradient(outs[-1])))
        outs.append(one(q_BTNH[:, q], k_BSKH[:, keys], v_BSKH[:, keys], arrays, q_start + start, keys.start))
    return jnp.concatenate(outs, axis=1)


def _without_blind(out_BTNH: jax.Array, mask: MaskSpec, *, alike: bool) -> jax.Array:
    """Zero for queries that see no key, to which the kernels give a mean of something: padding, and, where queries and
    keys have segments of their own (alike=False), a segment without keys."""
    if mask.q_segments_BT is None or mask.k_segments_BS is None:
        return out_BTNH
    seeing_BT = mask.q_segments_BT != 0
    if not alike:
        seeing_BT &= (mask.q_segments_BT[:, :, None] == mask.k_segments_BS[:, None, :]).any(axis=-1)
    return jnp.where(seeing_BT[:, :, None, None], out_BTNH, 0)


# On the mesh.


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where queries and keys lie on the mesh in context; `mapped` is False without one, or where all is manual."""

    mesh: Any
    sizes: dict[str, int]
    q_spec: PartitionSpec
    k_spec: PartitionSpec

    @property
    def mapped(self) -> bool:
        return math.prod(self.sizes.values()) > 1

    def axes(self, dim: int) -> tuple[str, ...]:
        return spec_names(self.q_spec[dim])

    def shards(self, dim: int) -> int:
        """Into how many parts this dim of the queries is split."""
        return math.prod(self.sizes[name] for name in self.axes(dim))

    def run(
        self,
        local: Callable[..., jax.Array],
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: MaskSpec,
        extra: Any,
        extra_specs: Any,
    ) -> jax.Array:
        """`local(q, k, v, mask, extra, q_start)` of each device's rows, heads and queries, with all their keys.

        extra: a pytree that extra_specs places: splash's kernel, cuDNN's position bias.
        """
        if not self.mapped:
            return local(q_BTNH, k_BSKH, v_BSKH, mask, extra, 0)

        def part(q_BTNH, k_BSKH, v_BSKH, mask, extra):
            k_BSKH, v_BSKH = (self._keys(x, heads=q_BTNH.shape[2]) for x in (k_BSKH, v_BSKH))
            q_start = jax.lax.axis_index(self.axes(1)) * q_BTNH.shape[1] if self.axes(1) else 0
            return local(q_BTNH, k_BSKH, v_BSKH, mask, extra, q_start)

        return jax.shard_map(
            part,
            in_specs=(self.q_spec, self.k_spec, self.k_spec, self._mask_specs(mask), extra_specs),
            out_specs=self.q_spec,
            axis_names=set(self.sizes),
            check_vma=False,  # kernels do not say over which axes their results vary
        )(q_BTNH, k_BSKH, v_BSKH, mask, extra)

    def _keys(self, x_BSKH: jax.Array, *, heads: int) -> jax.Array:
        """Keys or values of the whole row, for the query heads here; transposed, a reduce-scatter."""
        if self.axes(1):
            x_BSKH = jax.lax.all_gather(x_BSKH, self.axes(1), axis=1, tiled=True)
        if self.k_spec[2] == self.q_spec[2]:
            return x_BSKH
        # kv heads are replicated: those of the query heads here. One serves them all, or each gets its own copy.
        group = heads * self.shards(2) // x_BSKH.shape[2]
        first = jax.lax.axis_index(self.axes(2)) * heads
        if group % heads == 0:
            return jax.lax.dynamic_slice_in_dim(x_BSKH, first // group, 1, axis=2)
        return jnp.take(x_BSKH, (first + jnp.arange(heads)) // group, axis=2)

    def _mask_specs(self, mask: MaskSpec) -> MaskSpec:
        """Arrays of keys are whole in every row, those of queries are split like the queries."""
        rows, length = self.q_spec[0], self.q_spec[1]
        queries, keys = PartitionSpec(rows, length), PartitionSpec(rows, None)
        arrays, static = mask.tree_flatten()
        specs = (PartitionSpec(), keys, queries, keys, queries, keys)
        return MaskSpec.tree_unflatten(static, [None if a is None else s for a, s in zip(arrays, specs, strict=True)])


def _place(q_BTNH: Any, k_BSKH: Any) -> _Place:
    mesh, sizes = get_abstract_mesh(), free_axis_sizes()
    if math.prod(sizes.values()) == 1:
        return _Place(mesh, {}, PartitionSpec(None, None, None, None), PartitionSpec(None, None, None, None))
    q_spec = activation_spec(("batch", "length", "act_heads", "head"), q_BTNH.shape)
    k_spec = activation_spec(("batch", "length", "act_kv_heads", "head"), k_BSKH.shape)
    if q_spec[:2] != k_spec[:2] or k_spec[2] not in (None, q_spec[2]):
        raise UsageError(
            f"queries lie on the mesh as {q_spec} and keys as {k_spec}: rows, lengths and heads must be split alike "
            "(kv heads may be replicated); change config.mesh.rules"
        )
    return _Place(mesh, sizes, q_spec, k_spec)
