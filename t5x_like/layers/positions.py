"""Rotary positions (RoPE): tables of angles, and turning queries and keys by them. Learned positions: embedding.py.

Pairs are (i, i + H/2), the half-split order of Hugging Face; Meta's files rotate pairs (2i, 2i+1) and are permuted when
converted.

Legend: B batch, T length, N heads (query or kv), H head size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.layers.platform import platform


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretches low frequencies for longer texts. name: "none" or "llama3" (Llama 3.1; the other fields are its own).

    factor: of the wavelengths longer than original_length / low_frequency; those shorter than original_length /
    high_frequency stay; between them the two are mixed. original_length: tokens.
    """

    name: str
    factor: float
    low_frequency: float
    high_frequency: float
    original_length: int


SCALINGS = ("none", "llama3")


def frequencies(head: int, *, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians per position of each of the H/2 pairs, float64: theta ** (-2i / H) (arXiv 2104.09864, section 3.2.2)."""
    plain = theta ** (-np.arange(0, head, 2, dtype=np.float64) / head)
    if scaling.name == "none":
        return plain
    wavelengths = 2 * math.pi / plain
    share = (scaling.original_length / wavelengths - scaling.low_frequency) / (
        scaling.high_frequency - scaling.low_frequency
    )
    share = np.clip(share, 0.0, 1.0)  # 1: a short wavelength, kept; 0: a long one, stretched
    return plain * (share + (1 - share) / scaling.factor)


def rope_table(
    positions_BT: Int[Array, "B T"], head: int, *, theta: float, scaling: RopeScaling
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """(cosines, signed sines) for both halves of a head, float32. Computed once, shared by all layers of one theta."""
    per_position = jnp.asarray(frequencies(head, theta=theta, scaling=scaling), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * per_position[None, None, None, :]
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cosines, cosines], axis=-1), jnp.concatenate([-sines, sines], axis=-1)


@jax.custom_vjp
def rotate(
    x_BTNH: Float[Array, "B T N H"], table: tuple[Float[Array, "#B T 1 H"], Float[Array, "#B T 1 H"]]
) -> Float[Array, "B T N H"]:
    """Turns each pair by its angle; computed in float32 because angles of late positions need it.

    The gradient of a rotation is the rotation back. It is written out, since the compiler's own (of a cut and a join)
    takes three times as long on a CPU. The table itself has no gradient.
    """
    cosines, signed_sines = table
    turned = x_BTNH.astype(jnp.float32) * cosines + _swapped(x_BTNH).astype(jnp.float32) * signed_sines
    return turned.astype(x_BTNH.dtype)


def _rotate_back(table, g_BTNH):
    cosines, signed_sines = table
    return rotate(g_BTNH, (cosines, -signed_sines)), None


rotate.defvjp(lambda x_BTNH, table: (rotate(x_BTNH, table), table), _rotate_back)


def _swapped(x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The two halves of each head exchanged."""
    half = x_BTNH.shape[-1] // 2
    if platform() != "tpu":
        return jnp.roll(x_BTNH, half, axis=-1)
    # A product with a permutation, which is exact and which the TPU fuses with what follows; cutting and joining halves
    # of 64 lanes takes 4% of a layer's time (v5p, 8B shape, by the compiler's estimate).
    permutation = np.roll(np.eye(2 * half, dtype=np.float32), half, axis=1)
    return jnp.einsum(
        "BTNH,HG->BTNG",
        x_BTNH,
        jnp.asarray(permutation, x_BTNH.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=x_BTNH.dtype,
    )
