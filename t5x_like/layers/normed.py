"""An RMS norm and the products behind it as one operation, for TPUs: scaled in the weight, divided in the product.

(x / rms(x) * scale) W = x (scale W) / rms(x), since the rms is one number a token and the scale one a row of W. So
written, the gradient of a token's rms is the sum of gradient times value over its products, which is known before the
product that gives the gradient of x; and the gradient of the scale is a sum over the weight, no longer over tokens. So
the gradient of the norm is finished inside of that product, where it would be another pass over the activations behind
it. NOT here: norms as such (norms.py).

Legend: B batch, T length, D model; Y the dims of a product behind B and T.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from t5x_like.layers.norms import NAME, RmsNorm
from t5x_like.layers.platform import float32_products, platform
from t5x_like.layers.weights import einsum, value
from t5x_like.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Normed:
    """What an RMS norm reads and knows: x, 1 / rms of each token, and its scale."""

    x_BTD: jax.Array
    inverse_BT: jax.Array
    scale_D: jax.Array

    def times(self, equation: str, weight: nnx.Param, name: str, *axes: str) -> jax.Array:
        """The product of what the norm gives with a weight [D, ...], laid out by `axes`, and with a name for remat."""
        matrix = value(weight).astype(jnp.float32)
        scaled = matrix * self.scale_D.reshape(-1, *(1,) * (matrix.ndim - 1))
        return _times((equation, name, axes), self.x_BTD, self.inverse_BT, scaled)


def applies(norm: nnx.Module, *weights: nnx.Param) -> bool:
    """Whether `normed` may stand for this norm before products with these weights: on a TPU, of arrays."""
    return platform() == "tpu" and type(norm) is RmsNorm and all(isinstance(value(w), jax.Array) for w in weights)


def normed(norm: RmsNorm, x_BTD: jax.Array) -> Normed:
    return Normed(x_BTD, _inverse_rms(norm.epsilon, x_BTD), value(norm.scale).astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _inverse_rms(epsilon: float, x_BTD: jax.Array) -> jax.Array:
    """1 / rms of each token. Its gradient is written out in the result alone, so that remat may save that: the
    compiler's own reads the mean of squares too, and sums it up again."""
    return _inverse_rms_forward(epsilon, x_BTD)[0]


def _inverse_rms_forward(epsilon: float, x_BTD):
    mean_BT = jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1)
    inverse_BT = checkpoint_name(jax.lax.rsqrt(mean_BT + epsilon), NAME)
    return inverse_BT, (x_BTD, inverse_BT)


def _inverse_rms_backward(epsilon: float, saved, g_BT):
    x_BTD, inverse_BT = saved
    factor_BT = -g_BT * inverse_BT**3 / x_BTD.shape[-1]
    return ((factor_BT[..., None] * x_BTD.astype(jnp.float32)).astype(x_BTD.dtype),)


_inverse_rms.defvjp(_inverse_rms_forward, _inverse_rms_backward)


Form = tuple[str, str, tuple[str, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _times(form: Form, x_BTD, inverse_BT, weight):
    return _forward(form, x_BTD, inverse_BT, weight)[0]


def _forward(form: Form, x_BTD, inverse_BT, weight):
    equation, name, axes = form
    product = einsum(equation, x_BTD, weight).astype(jnp.float32)
    divided = (product * _like(inverse_BT, product)).astype(x_BTD.dtype)
    result = checkpoint_name(constrain(divided, "batch", "length", *axes), name)
    return result, (x_BTD, inverse_BT, weight, result)


def _backward(form: Form, saved, g_BTY):
    """Of r = z / rms: dz = dr / rms, and d(1 / rms) = <dr, z> = <dr, r> rms."""
    x_BTD, inverse_BT, weight, result = saved
    wide = g_BTY.astype(jnp.float32)
    inner_BT = jnp.sum(wide * result.astype(jnp.float32), axis=tuple(range(2, wide.ndim)))
    g_product = (wide * _like(inverse_BT, wide)).astype(x_BTD.dtype)
    with float32_products(x_BTD.dtype):  # which a gradient that is written out does not keep
        g_x_BTD, g_weight = jax.vjp(functools.partial(einsum, form[0]), x_BTD, weight)[1](g_product)
    return g_x_BTD, inner_BT / inverse_BT, g_weight


_times.defvjp(_forward, _backward)


def _like(numbers_BT: jax.Array, array: jax.Array) -> jax.Array:
    return numbers_BT.reshape(*numbers_BT.shape, *(1,) * (array.ndim - 2))
