"""Rotary positions (RoPE): tables of angles, and turning queries and keys by them. Learned positions: embedding.py.

Pairs are (i, i + H/2), the half-split order of Hugging Face; Meta's files rotate pairs (2i, 2i+1) and are permuted when
converted.

Legend: B batch, T length, N heads (query or kv), H head size, R = H / 2 pairs.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """(cosines, sines), float32. Computed once and shared by all layers of one theta."""
    per_position = jnp.asarray(frequencies(head, theta=theta, scaling=scaling), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * per_position[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"], table: tuple[Float[Array, "#B T 1 R"], Float[Array, "#B T 1 R"]]
) -> Float[Array, "B T N H"]:
    """Turns each pair by its angle; computed in float32 because angles of late positions need it."""
    cosines, sines = table
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return turned.astype(x_BTNH.dtype)
