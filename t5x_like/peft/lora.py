"""A weight with a low-rank addition, W + A s B, as a leaf that layers multiply with (core.types.Leaf).

Products go x W + ((x A) s) B: W + A s B is written out for a head and for merging alone. W may itself be a leaf, such
as a quantized one. Which weights have an addition, and how A and B begin, is said in attach.py.

Legend: R rank, L layers, E experts, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_like.core.types import Axes
from t5x_like.layers import weights
from t5x_like.layers.platform import matmul_precision

_RANK = "R"  # the letter of the rank in equations


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scale_R", "key"],
    meta_fields=["axes", "dropout"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraArray:
    """base: the weight W. a: its input dims and the rank, b: the rank and its output dims, both behind W's batch dims
    (layers, experts). scale_R: s, one number for each of the rank's columns, behind `layers`.

    key: of the dropout of x before A, the bits of one for each layer; None for none. axes: of W as a whole, also where
    the leaf at hand is one layer of it.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale_R: jax.Array
    key: jax.Array | None
    axes: Axes
    dropout: float

    kind = "lora"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def with_key(self, key: jax.Array) -> "LoraArray":
        """The same in training: `key` is that of this leaf and call. Without a rate it is not needed."""
        if self.dropout == 0.0:
            return self
        stacked = self.scale_R.ndim == 2
        keys = jax.random.split(key, len(self.scale_R)) if stacked else key
        return dataclasses.replace(self, key=jax.random.key_data(keys))

    def contract(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs, output = equation.split("->")
        of_x, of_w = inputs.split(",")
        assert _RANK not in equation, "the letter is taken"
        contracted = [letter for letter in of_w if letter in of_x]
        kept, old, new = of_x[: len(of_x) - len(contracted)], "".join(contracted), of_w[len(contracted) :]
        low = weights.einsum(f"{of_x},{old}{_RANK}->{kept}{_RANK}", self._dropped(x), self.a)
        added = weights.einsum(f"{kept}{_RANK},{_RANK}{new}->{output}", self._scaled(low), self.b)
        return weights.einsum(equation, x, self.base) + added

    def rows(self, ids: Int[Array, "..."], dtype: str) -> Float[Array, "..."]:
        low = self._scaled(weights.take(self.a, ids, dtype=dtype))
        return weights.take(self.base, ids, dtype=dtype) + jnp.matmul(low, self.b.astype(dtype))

    def against_rows(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 products with each row of a [V, D] weight, which is an LM head."""
        base = weights.against_rows(x_BTD, self.base)
        if base is None:
            base = _float32("BTD,VD->BTV", x_BTD, weights.dense(self.base, x_BTD.dtype))
        low = self._scaled(_float32("BTD,RD->BTR", x_BTD, self.b))
        return base + _float32("BTR,VR->BTV", low.astype(x_BTD.dtype), self.a)

    def ragged(self, x: Float[Array, "M D"], sizes: Int[Array, " E"]) -> Float[Array, "M F"]:
        low = self._scaled(weights.ragged(self._dropped(x), self.a, sizes))
        return weights.ragged(x, self.base, sizes) + weights.ragged(low, self.b, sizes)

    def dense(self, dtype: Any) -> jax.Array:
        """W + A s B, added up in float32; all layers at once where it has several."""
        base = jnp.asarray(weights.dense(self.base, jnp.float32)).astype(jnp.float32)
        batch = self.a.ndim + self.b.ndim - 2 - base.ndim
        outer = base.shape[:batch]
        rank = self.a.shape[-1]
        scale = self.scale_R.reshape(*self.scale_R.shape[:-1], *(1,) * (len(outer) - self.scale_R.ndim + 1), 1, rank)
        a = self.a.reshape(*outer, math.prod(self.a.shape[batch:-1]), rank).astype(jnp.float32)
        b = self.b.reshape(*outer, rank, math.prod(self.b.shape[batch + 1 :])).astype(jnp.float32)
        added = jnp.matmul(a * jnp.broadcast_to(scale, (*outer, 1, rank)), b, precision=jax.lax.Precision.HIGHEST)
        return (base + added.reshape(base.shape)).astype(dtype)

    def astype(self, dtype: Any) -> "LoraArray":
        """Its parts in another type, to which products round them anyway."""
        cast = {name: getattr(self, name).astype(dtype) for name in ("base", "a", "b")}
        return dataclasses.replace(self, **cast)

    def _scaled(self, low: jax.Array) -> jax.Array:
        return low * self.scale_R.astype(low.dtype).reshape((1,) * (low.ndim - 1) + (-1,))

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None:
            return x
        kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), jnp.zeros((), x.dtype))


def _float32(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    precision = matmul_precision(x.dtype)
    return jnp.einsum(equation, x, w.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
