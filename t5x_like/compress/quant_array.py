"""int8 weights: whole numbers with one float32 scale for each output channel, symmetric.

    w = q * scale,  scale = max|w| / 127 over what a product sums,  q from -127 to 127,  |w - q * scale| <= scale / 2

The scale leaves the sum: x W = (x q) * scale, so that a product reads one byte a weight and no float weight is written
out. Which weights become such leaves: choice.py; how they are read: reading.py.

Legend: K contracted, N new, V vocab, D model, M rows, E experts, F new dim of an expert.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_abstract_mesh

from t5x_like.core.types import Axes
from t5x_like.layers.platform import platform
from t5x_like.layers.weights import parse
from t5x_like.storage.streams import chunks

KIND = "int8"
LARGEST = 127
# On a CPU, products of few rows convert their weights a block at a time (docs/log.md): XLA's matrix product wants
# floats, and would write the whole weight out in them. Rows up to which that is faster, and bytes of a float block.
FEW_ROWS, BLOCK_BYTES = 32, 3 << 20
_PART_BYTES = 1 << 20  # of float32 that are quantized at a time: the passes over them stay in a core's cache


def quantized(w: np.ndarray, dims: tuple[int, ...], scale_dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, scales with size 1 in `dims`) of a float weight whose dims `dims` are summed.

    Rounds half to even. A channel of zeros, or of numbers too small for a scale, has the scale 1, and one
    that holds NaN or infinity a scale that is not finite. scale_dtype: what
    scales are rounded to before they are used. In numpy alone: a compiler that divides in another way would round ties
    differently, and the same model would have other bits.
    """
    values = np.empty(w.shape, np.int8)
    scale = np.empty([1 if dim in dims else size for dim, size in enumerate(w.shape)], scale_dtype)
    for part in chunks(w.shape, _part(w.shape, dims)):
        where = tuple(slice(*span) for span in part)
        piece = w[where].astype(np.float32, copy=False)
        largest = np.max(np.abs(piece), axis=dims, keepdims=True)
        found = (largest / np.float32(LARGEST)).astype(scale_dtype)
        found = np.where(found.astype(np.float32) < np.finfo(np.float32).tiny, np.ones((), scale_dtype), found)
        with np.errstate(invalid="ignore"):  # whoever asks looks whether the scales are finite
            steps = np.rint(piece / found.astype(np.float32))
            values[where] = np.clip(steps, -LARGEST, LARGEST)  # a scale that was rounded down gives more steps
        scale[tuple(slice(0, 1) if dim in dims else span for dim, span in enumerate(where))] = found
    return values, scale


def _part(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """The shape of what is quantized at a time: whole channels, as many as are `_PART_BYTES` large."""
    part = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    for dim in reversed(range(len(shape))):
        room = _PART_BYTES // (4 * math.prod(part))
        part[dim] = max(part[dim], min(shape[dim], max(room, 1)))
    return tuple(part)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantArray:
    """A core.types.Leaf. values: int8, in the shape of the weight. scale: float32, of size 1 in contracted dims.

    stored_axes: those of the whole leaf; a layer cut out of its stack has no dim for the first of them.
    """

    values: Any
    scale: Any
    stored_axes: Axes = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def axes(self) -> Axes:
        return self.stored_axes[len(self.stored_axes) - len(self.shape) :]

    @property
    def kind(self) -> str:
        return KIND

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        kept, new = parse(equation)
        contracted = len(self.shape) - new
        rows = math.prod(x.shape[:kept])
        if _in_blocks(rows):
            product = _blocked(x.reshape(rows, -1), self.values.reshape(math.prod(self.shape[:contracted]), -1))
            product = product.reshape(x.shape[:kept] + self.shape[contracted:])
        else:
            product = jnp.einsum(equation, x, self.values.astype(x.dtype), preferred_element_type=jnp.float32)
        return (product * self.scale.reshape((1,) * kept + self.scale.shape[contracted:])).astype(x.dtype)

    def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        values, scale = (part.at[ids].get(mode="clip") for part in (self.values, self.scale))
        return (values.astype(jnp.float32) * scale).astype(dtype)

    def against_rows(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 products [B, T, V] with each row of a [V, D] weight."""
        rows = math.prod(x_BTD.shape[:2])
        if _in_blocks(rows):
            product_BTV = _blocked_rows(x_BTD.reshape(rows, -1), self.values).reshape(*x_BTD.shape[:2], -1)
        else:
            product_BTV = jnp.einsum(
                "BTD,VD->BTV", x_BTD, self.values.astype(x_BTD.dtype), preferred_element_type=jnp.float32
            )
        return product_BTV * self.scale.reshape(1, 1, -1)

    def ragged(self, x_MD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        scale_MF = jnp.repeat(self.scale[:, 0], sizes_E, axis=0, total_repeat_length=x_MD.shape[0])
        product_MF = jax.lax.ragged_dot(
            x_MD, self.values.astype(x_MD.dtype), sizes_E, preferred_element_type=jnp.float32
        )
        return (product_MF * scale_MF).astype(x_MD.dtype)

    def dense(self, dtype: Any) -> jax.Array:
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def _in_blocks(rows: int) -> bool:
    return rows <= FEW_ROWS and platform() == "cpu" and get_abstract_mesh().size <= 1


def _blocked(x_MK: jax.Array, values_KN: jax.Array) -> jax.Array:
    """Float32 x q, with the values converted one block of K after another."""
    size_k, size_n = values_KN.shape
    block = _block(size_k, 4 * size_n)
    if block == size_k:
        return jnp.matmul(x_MK, values_KN.astype(x_MK.dtype), preferred_element_type=jnp.float32)

    def add(sum_MN: jax.Array, begin: jax.Array | int, count: int = block) -> tuple[jax.Array, None]:
        x_Mb = jax.lax.dynamic_slice_in_dim(x_MK, begin, count, 1)
        values_bN = jax.lax.dynamic_slice_in_dim(values_KN, begin, count, 0)
        return sum_MN + jnp.matmul(x_Mb, values_bN.astype(x_MK.dtype), preferred_element_type=jnp.float32), None

    start, rest = jnp.zeros((x_MK.shape[0], size_n), jnp.float32), size_k % block
    found = jax.lax.scan(add, start, jnp.arange(0, size_k - rest, block))[0]
    return add(found, size_k - rest, rest)[0] if rest else found


def _blocked_rows(x_MD: jax.Array, values_VD: jax.Array) -> jax.Array:
    """Float32 x q^T, with the values converted one block of V after another."""
    size = values_VD.shape[0]
    block = _block(size, 4 * values_VD.shape[1])

    def product(begin: jax.Array | int, count: int = block) -> jax.Array:
        values_bD = jax.lax.dynamic_slice_in_dim(values_VD, begin, count, 0).astype(x_MD.dtype)
        return jnp.einsum("MD,bD->Mb", x_MD, values_bD, preferred_element_type=jnp.float32)

    rest = size % block
    parts_nMb = jax.lax.map(product, jnp.arange(0, size - rest, block))
    found_MV = parts_nMb.transpose(1, 0, 2).reshape(x_MD.shape[0], -1)
    return jnp.concatenate([found_MV, product(size - rest, rest)], axis=1) if rest else found_MV


def _block(size: int, bytes_each: int) -> int:
    """How many rows of `bytes_each` are a block, at most BLOCK_BYTES: a divisor of `size`, unless the largest is below
    half of what may be, as of a prime."""
    most = min(max(BLOCK_BYTES // bytes_each, 1), size)
    divisor = max(d for d in range(1, most + 1) if size % d == 0)
    return divisor if 2 * divisor > most else most


def abstract(parts: dict[str, Any], shape: tuple[int, ...], axes: Axes) -> QuantArray:
    """What storage/leaves.py builds a leaf by, from its recorded parts."""
    return QuantArray(parts["values"], parts["scale"], axes)


KINDS = {KIND: abstract}
