"""Weights that are no plain arrays, for the tests of contractions: W + A B, and whole numbers with scales."""

import dataclasses

import jax
import jax.numpy as jnp

from t5x_like.layers import weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """W + A B of a [D, ...] weight, as LoRA multiplies it: x W + (x A) B (arXiv 2106.09685). a: [D, r], b: [r, ...]."""

    base: jax.Array
    a: jax.Array
    b: jax.Array
    axes: tuple = dataclasses.field(metadata={"static": True}, default=())
    kind = "low_rank"

    @property
    def shape(self):
        return self.base.shape

    def contract(self, equation, x):
        inputs, output = equation.split("->")
        letters_x, letters_w = inputs.split(",")
        kept = letters_x.removesuffix(letters_w[0])
        assert kept != letters_x, "one contracted dim"
        inner = weights.einsum(f"{letters_x},{letters_w[0]}Z->{kept}Z", x, self.a)
        return weights.einsum(equation, x, self.base) + weights.einsum(
            f"{kept}Z,Z{letters_w[1:]}->{output}", inner, self.b
        )

    def rows(self, ids, dtype):
        low = weights.take(self.a, ids, dtype=dtype)
        return weights.take(self.base, ids, dtype=dtype) + jnp.matmul(low, self.b.astype(dtype))

    def ragged(self, x, sizes):
        raise NotImplementedError

    def dense(self, dtype):
        return (self.base + jnp.tensordot(self.a, self.b, 1)).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """int8 values [..., D, F] times scales [..., 1, F]."""

    values: jax.Array
    scales: jax.Array
    axes: tuple = dataclasses.field(metadata={"static": True}, default=())
    kind = "scaled"

    @property
    def shape(self):
        return self.values.shape

    def contract(self, equation, x):
        return weights.einsum(equation, x, self.values) * self.scales[0].astype(x.dtype).reshape(
            (1,) * (x.ndim - 1) + (-1,)
        )

    def rows(self, ids, dtype):
        raise NotImplementedError

    def ragged(self, x, sizes):
        return weights.ragged(x, self.dense(x.dtype), sizes)

    def dense(self, dtype):
        return (self.values * self.scales).astype(dtype)
