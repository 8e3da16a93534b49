"""Matrix products of training in int8: what a weight of a layer becomes under config.model.dtype.products.

    x W  ~  s_x s_w (q_x q_w),   q = round(a / s),   s = max|a| / 127 over what the product sums

Scales are found anew in every call (dynamic): one a token of x, one an output channel of W; the sum of products of
whole numbers is exact in int32 (on a CPU it is made in float32, exact for up to 1,040 terms). Gradients go straight
through the rounding: they are those of x W as if nothing were rounded. "int8_forward" multiplies them in the compute
type. "int8" also has dx = g W^T in int8, with g rounded stochastically, floor(g / s + u) with u uniform in [0, 1), so
that what dx is on average is g W'^T, W' the rounded weight. dW = x^T g stays in the compute type, where its sum is over
all tokens of a batch: SwitchBack (arXiv 2304.13013, section 2) does so for its noise, and the TPU compiler counts more
cycles for it in int8 (docs/log.md). Dynamic scales and stochastic rounding in both passes are those of AQT
(github.com/google/aqt, arXiv 2105.03536).

Which weights: matrices of layers. Embeddings, LM head, norms and biases are NOT, nor a layer that reads a cache.

Legend: letters of equations in small: k kept, c contracted, n new.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import get_abstract_mesh

from t5x_like.core import tree
from t5x_like.core.types import Axes, Tree
from t5x_like.layers import weights
from t5x_like.layers.platform import float32_products, platform

LARGEST = 127
SMALLEST = 1e-30  # below it 127 / max|a| would come near the end of float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Product:
    """A core.types.Leaf: an array that is multiplied with in int8.

    seeds: uint32, one a layer, of the rounding of gradients; None rounds them to nearest. backward: whether dx is a
    product in int8 too. stored_axes: those of the whole leaf; one layer of it has no dim for the first.
    """

    array: Any
    seeds: Any
    stored_axes: Axes = dataclasses.field(metadata={"static": True})
    backward: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def axes(self) -> Axes:
        return self.stored_axes[len(self.stored_axes) - len(self.shape) :]

    @property
    def kind(self) -> str:
        return "array"

    def with_key(self, key: jax.Array) -> "Int8Product":
        """A core.types.RandomLeaf: `key` is that of this leaf, step and micro-batch."""
        seeds = jax.random.bits(key, self.shape[:1], jnp.uint32) if self.backward else None
        return dataclasses.replace(self, seeds=seeds)

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        kept, new = weights.parse(equation)
        w, shape = self.array, self.array.shape
        contracted = len(shape) - new
        kept_shape, new_shape = x.shape[:kept], shape[contracted:]
        if get_abstract_mesh().size <= 1:  # as a plain matrix product: as in weights.einsum
            equation, size = "KC,CN->KN", math.prod(shape[:contracted])
            x, w = x.reshape(-1, size), w.reshape(size, -1)
        product: Any = _product(equation, self.backward, x, w, self.seeds)
        return product.reshape(kept_shape + new_shape)

    # Neither a lookup nor experts are multiplied in int8.

    def rows(self, ids: jax.Array, dtype: Any) -> jax.Array:
        return weights.take(self.array, ids, dtype=dtype)

    def ragged(self, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return weights.ragged(x, self.array, sizes)

    def dense(self, dtype: Any) -> jax.Array:
        return self.array.astype(dtype)


def in_products(params: Tree, specs: Tree, *, backward: bool) -> dict[str, Any]:
    """The parameters of one call with the matrices of layers as Int8Product. Leaves of other kinds stay as they are."""
    flat = tree.flatten(specs)

    def of_leaf(path: str, leaf: Any) -> Any:
        axes = flat[path].axes
        return Int8Product(leaf, None, axes, backward) if is_matrix(axes) and isinstance(leaf, jax.Array) else leaf

    return tree.map_with_path(of_leaf, params)


def is_matrix(axes: Axes) -> bool:
    """Whether a parameter with these axes is a matrix of a layer: it reads or writes the model's width.

    >>> is_matrix(("layers", "heads", "head", "embed")), is_matrix(("layers", "heads", "head"))
    (True, False)
    >>> is_matrix(("layers", "norm")), is_matrix(("vocab", "embed"))
    (False, False)
    """
    return axes[:1] == ("layers",) and "embed" in axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, backward: bool, x: jax.Array, w: jax.Array, seed: jax.Array | None) -> jax.Array:
    kept, new = weights.parse(equation)
    q_x, scale_x = quantized(x, tuple(range(kept, x.ndim)))
    q_w, scale_w = quantized(w, tuple(range(w.ndim - new)))
    return _scaled(_whole_numbers(equation, q_x, q_w), scale_x, scale_w, kept, new).astype(x.dtype)


def _forward(equation, backward, x, w, seed):
    return _product(equation, backward, x, w, seed), (x, w, seed)


def _backward(equation, backward, saved, g):
    with float32_products(g.dtype):  # which a gradient that is written out does not keep
        return _gradients(equation, backward, saved, g)


def _gradients(equation, backward, saved, g):
    x, w, seed = saved
    kept, new = weights.parse(equation)
    contracted = w.ndim - new
    k, c, n = equation[:kept], equation[kept : x.ndim], equation[x.ndim + 1 + contracted : x.ndim + 1 + w.ndim]
    g_w = jnp.einsum(f"{k}{c},{k}{n}->{c}{n}", x, g, preferred_element_type=x.dtype).astype(w.dtype)
    if backward:
        q_g, scale_g = quantized(g, tuple(range(kept, g.ndim)), seed)
        q_w, scale_w = quantized(w, tuple(range(contracted, w.ndim)))
        g_x = _scaled(_whole_numbers(f"{k}{n},{c}{n}->{k}{c}", q_g, q_w), scale_g, scale_w, kept, contracted)
    else:
        g_x = jnp.einsum(f"{k}{n},{c}{n}->{k}{c}", g, w.astype(g.dtype), preferred_element_type=g.dtype)
    return g_x.astype(x.dtype), g_w, None


_product.defvjp(_forward, _backward)


def quantized(x: jax.Array, dims: tuple[int, ...], seed: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(int8 values, float32 scales of size 1 in `dims`) of x, rounded to nearest, or stochastically with a seed.

    What is not finite gives a scale that is not, and so a product that is not. Where nothing reaches SMALLEST all is 0,
    with the scale 1 / 127.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=dims, keepdims=True)
    largest = jnp.where(largest < SMALLEST, 1.0, largest)
    steps = x * (LARGEST / largest)
    steps = jnp.round(steps) if seed is None else jnp.floor(steps + uniform(x.shape, seed))
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), largest / LARGEST


def uniform(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """Numbers in [0, 1), float32: a hash of the seed and of an element's place, the same on any mesh.

    A generator would write its numbers out and read them again; a hash is fused into what uses it (docs/log.md). Places
    count in 32 bits: of larger arrays the leading dims are hashed apart. Two seeds give the same numbers in another
    order. The constants are of "lowbias32" (github.com/skeeto/hash-prospector, public domain).
    """
    outer = _outer(shape)
    bits = _hashed(_places(shape, range(outer, len(shape))) ^ seed)
    if outer:
        bits = _hashed(_places(shape, range(outer)) ^ bits)
    return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24  # TPUs convert signed numbers alone


def _outer(shape: tuple[int, ...]) -> int:
    """How many leading dims a place of 32 bits does not count.

    >>> _outer((64, 4096, 16384)), _outer((128, 4096, 16384))
    (0, 1)
    """
    return next(dims for dims in range(len(shape) + 1) if math.prod(shape[dims:]) <= 2**32)


def _places(shape: tuple[int, ...], dims: range) -> jax.Array:
    """The place of each element among those that differ in these dims."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(dims):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    return place


def _hashed(bits: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def _whole_numbers(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    if platform() == "cpu":  # its integer products are loops; those of floats are exact up to 1,040 terms
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.int32).astype(jnp.float32)


def _scaled(sums: jax.Array, scale_a: jax.Array, scale_b: jax.Array, kept: int, new: int) -> jax.Array:
    """sums [kept, new] times the scales of both operands, which have size 1 in the dims that were summed."""
    scale_a = scale_a.reshape(sums.shape[:kept] + (1,) * new)
    return sums * scale_a * scale_b.reshape((1,) * kept + sums.shape[kept:])
