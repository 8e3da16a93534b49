"""An RMS norm and the products behind it as one operation, for accelerators: a token is divided by its rms at the end.

(x scale / rms(x)) W = (x scale W) / rms(x), since the rms is one number a token. So written, the backward pass knows
what it needs of a token's rms before the product that gives the gradient of x: the sum over a token's products of
gradient times value, whatever linear map (rotary positions) follows. Then the gradient of the norm is finished in that
product, where it would be another pass over the activations, after all of them. NOT here: norms as such (norms.py).

Legend: B batch, T length, D model; Y the dims of a product behind B and T.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from t5x_like.layers.norms import NAME, RmsNorm
from t5x_like.layers.platform import platform
from t5x_like.layers.positions import rotate
from t5x_like.layers.weights import einsum, value
from t5x_like.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Normed:
    """What a norm gives, not yet divided by the rms: x * scale, and 1 / rms of each token."""

    x_BTD: jax.Array
    inverse_BT: jax.Array

    def times(
        self,
        equation: str,
        weight: nnx.Param,
        name: str,
        *axes: str,
        rope: Any = None,
        factor: float | None = None,
    ) -> jax.Array:
        """The product of what the norm gives with a weight, turned by `rope`, times `factor`; laid out by `axes`, and
        with a name for remat."""
        return _times((equation, name, axes, factor), self.x_BTD, self.inverse_BT, value(weight), rope)


def applies(norm: nnx.Module, *weights: nnx.Param) -> bool:
    """Whether `normed` may stand for this norm before products with these weights: on a TPU, of arrays."""
    arrays = all(isinstance(value(weight), jax.Array) for weight in weights)
    return platform() == "tpu" and type(norm) is RmsNorm and arrays


def normed(norm: RmsNorm, x_BTD: jax.Array) -> Normed:
    wide = x_BTD.astype(jnp.float32)
    inverse_BT = checkpoint_name(jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + norm.epsilon), NAME)
    scale_D = value(norm.scale).astype(jnp.float32)
    return Normed((wide * scale_D[None, None, :]).astype(x_BTD.dtype), inverse_BT)


Form = tuple[str, str, tuple[str, ...], float | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _times(form: Form, x_BTD, inverse_BT, weight, rope):
    return _forward(form, x_BTD, inverse_BT, weight, rope)[0]


def _forward(form: Form, x_BTD, inverse_BT, weight, rope):
    equation, name, axes, _ = form
    product = einsum(equation, x_BTD, weight).astype(jnp.float32)
    divided = (product * _like(inverse_BT, product)).astype(x_BTD.dtype)
    result = checkpoint_name(constrain(_after(form, rope)(divided), "batch", "length", *axes), name)
    return result, (x_BTD, inverse_BT, weight, rope, result)


def _backward(form: Form, saved, g_BTY):
    """With r = A (z / rms) and A linear: <dr, r> = <d(z / rms), z / rms>, which is what the rms of a token gets."""
    x_BTD, inverse_BT, weight, rope, result = saved
    equation, _, axes, _ = form
    wide = g_BTY.astype(jnp.float32)
    inner_BT = jnp.sum(wide * result.astype(jnp.float32), axis=tuple(range(2, wide.ndim)))
    (g_divided,) = jax.vjp(_after(form, rope), jnp.zeros_like(result))[1](g_BTY)
    g_divided = g_divided.astype(jnp.float32)
    g_product = (g_divided * _like(inverse_BT, g_divided)).astype(x_BTD.dtype)
    g_product = constrain(g_product, "batch", "length", *axes)
    g_x_BTD, g_weight = jax.vjp(functools.partial(einsum, equation), x_BTD, weight)[1](g_product)
    return g_x_BTD, inner_BT / inverse_BT, g_weight, None


_times.defvjp(_forward, _backward)


def _after(form: Form, rope: Any) -> Callable[[jax.Array], jax.Array]:
    """What follows the product, a linear map."""
    factor = form[3]

    def run(divided):
        turned = divided if rope is None else rotate(divided, rope)
        return turned if factor is None else turned * factor

    return run


def _like(numbers_BT: jax.Array, array: jax.Array) -> jax.Array:
    return numbers_BT.reshape(*numbers_BT.shape, *(1,) * (array.ndim - 2))
