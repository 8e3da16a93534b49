"""Token embedding with optional learned positions. Rotary positions: positions.py; the head: scoring/head.py.

Legend: B batch, T length, D model, V vocab (padded).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.layers.param import param
from t5x_like.layers.weights import take


class Embedding(nnx.Module):
    """positions: number of learned positions, 0 for none."""

    def __init__(self, *, vocab: int, embed: int, positions: int, init: str):
        self.tokens = param((vocab, embed), axes=("vocab", "embed"), init=init)
        if positions:
            self.positions = param((positions, embed), axes=("positions", "embed"), init=init)
        self.learned = positions > 0

    def __call__(
        self, ids_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"] | None, *, dtype: str
    ) -> Float[Array, "B T D"]:
        """positions_BT None: the index."""
        x_BTD = take(self.tokens, ids_BT, dtype=dtype)
        if not self.learned:
            return x_BTD
        if positions_BT is None:
            positions_BT = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)[None, :]
        return x_BTD + take(self.positions, positions_BT, dtype=dtype)
