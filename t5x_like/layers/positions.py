"""Rotary positions (RoPE): tables of angles, and turning queries and keys by them. Learned positions: embedding.py.

Pairs are (i, i + H/2), the half-split order of Hugging Face; Meta's files rotate pairs (2i, 2i+1) and are permuted when
converted.

Legend: B batch, T length, N heads (query or kv), H head size.
"""

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.core.config import VARIANT, nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers.platform import platform


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies divided by factor, which is position interpolation (arXiv 2306.15595)."""

    factor: float

    def check(self, path: str) -> None:
        _above_zero(self, path)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: low frequencies divided, high ones kept, those between mixed.

    factor: of the wavelengths longer than original_length / low_frequency; those shorter than original_length /
    high_frequency stay; between them the two are mixed. original_length: tokens.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_length: int

    def check(self, path: str) -> None:
        _above_zero(self, path)
        if not self.high_frequency > self.low_frequency:
            raise UsageError(
                f"{path}.high_frequency={self.high_frequency:g} should be above {path}.low_frequency="
                f"{self.low_frequency:g}"
            )


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071, sections 3.2 to 3.4): by the number of turns that a pair makes in original_length tokens.

    Pairs of more than beta_fast turns are kept, those of fewer than beta_slow divided by factor, between them it goes
    linearly with the pair's number. attention_factor multiplies cosines and sines, so logits grow by its square; the
    paper's is 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float

    def check(self, path: str) -> None:
        _above_zero(self, path)
        if not self.beta_fast > self.beta_slow:
            raise UsageError(f"{path}.beta_fast={self.beta_fast:g} should be above {path}.beta_slow={self.beta_slow:g}")


def _above_zero(section: "Linear | Llama3 | Yarn", path: str) -> None:
    for field in dataclasses.fields(section):
        if not getattr(section, field.name) > 0:
            raise UsageError(f"{path}.{field.name}={getattr(section, field.name)} should be above 0")


Scaling: TypeAlias = Linear | Llama3 | Yarn | None  # None: as trained
SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The section `rope.scaling` of a config: frequencies for texts longer than those of the first training.

    name: a name in SCALINGS.
    """

    name: str
    linear: Linear | None = dataclasses.field(metadata=VARIANT)
    llama3: Llama3 | None = dataclasses.field(metadata=VARIANT)
    yarn: Yarn | None = dataclasses.field(metadata=VARIANT)

    def check(self, path: str) -> None:
        if self.name not in SCALINGS:
            raise UsageError(f"{path}.name={self.name!r} is unknown; {nearest(self.name, SCALINGS)}")

    @property
    def chosen(self) -> Scaling:
        """The variant that is named."""
        return self.linear or self.llama3 or self.yarn


def frequencies(head: int, *, theta: float, scaling: Scaling) -> np.ndarray:
    """Radians per position of each of the H/2 pairs, float64: theta ** (-2i / H) (arXiv 2104.09864, section 3.2.2)."""
    plain = theta ** (-np.arange(0, head, 2, dtype=np.float64) / head)
    match scaling:
        case None:
            return plain
        case Linear():
            return plain / scaling.factor
        case Llama3():
            turns = scaling.original_length / (2 * math.pi / plain)
            share = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        case Yarn():
            first, last = (
                head * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )  # numbers of the pairs that make so many turns
            first, last = max(math.floor(first), 0), min(math.ceil(last), head - 1)
            share = 1 - (np.arange(head // 2) - first) / max(last - first, 1e-3)
    share = np.clip(share, 0.0, 1.0)  # 1: a short wavelength, kept; 0: a long one, stretched
    return plain * (share + (1 - share) / scaling.factor)


def rope_table(
    positions_BT: Int[Array, "B T"], head: int, *, theta: float, scaling: Scaling
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """(cosines, signed sines) for both halves of a head, float32. Computed once, shared by all layers of one theta."""
    per_position = jnp.asarray(frequencies(head, theta=theta, scaling=scaling), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * per_position[None, None, None, :]
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    if isinstance(scaling, Yarn):
        cosines, sines = cosines * scaling.attention_factor, sines * scaling.attention_factor
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
