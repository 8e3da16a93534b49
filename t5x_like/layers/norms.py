"""Normalisation over the last dim: RMS norm and layer norm, computed in float32. Not batch statistics.

Legend: B batch, T length, D model.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_like.layers.param import ONES, ZEROS, param
from t5x_like.layers.weights import value

NAME = "norm"  # of what a norm sums up, one number a token, by which remat can save it


class RmsNorm(nnx.Module):
    """x / rms(x) * scale (arXiv 1910.07467)."""

    def __init__(self, size: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((size,), axes=("norm",), init=ONES)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _rms(x, _row(self.scale, x.ndim), self.epsilon)


class RmsNormPlusOne(nnx.Module):
    """x / rms(x) * (1 + scale): Gemma's (arXiv 2403.08295), whose stored scales are around zero."""

    def __init__(self, size: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((size,), axes=("norm",), init=ZEROS)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return _rms(x, 1.0 + _row(self.scale, x.ndim), self.epsilon)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias (arXiv 1607.06450)."""

    def __init__(self, size: int, *, epsilon: float):
        self.epsilon = epsilon
        self.scale = param((size,), axes=("norm",), init=ONES)
        self.bias = param((size,), axes=("norm",), init=ZEROS)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        centred = wide - checkpoint_name(jnp.mean(wide, axis=-1), NAME)[..., None]
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1) + self.epsilon)
        inverse = checkpoint_name(inverse, NAME)[..., None]
        return (centred * inverse * _row(self.scale, x.ndim) + _row(self.bias, x.ndim)).astype(x.dtype)


NORMS: dict[str, type[RmsNorm] | type[RmsNormPlusOne] | type[LayerNorm]] = {
    "rms": RmsNorm,  # also T5's
    "rms_plus_one": RmsNormPlusOne,
    "layer": LayerNorm,
}


def _rms(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = checkpoint_name(jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + epsilon), NAME)[..., None]
    return (wide * inverse * scale).astype(x.dtype)


def _row(w: nnx.Param, ndim: int) -> jax.Array:
    """A vector as an array of `ndim` dims: ranks are never promoted silently."""
    array = value(w).astype(jnp.float32)
    return array.reshape((1,) * (ndim - 1) + array.shape)
