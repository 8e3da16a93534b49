"""Token embedding with optional learned positions and token types. Rotary positions: positions.py; the head:
scoring/head.py.

Legend: B batch, T length, D model, V vocab (padded).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5x_like.layers.norms import NORMS
from t5x_like.layers.param import param
from t5x_like.layers.weights import take


class Embedding(nnx.Module):
    """norm(scale * token + type + position).

    positions: number of learned positions, 0 for none. offset: rows of their table before that of position 0 (2 in
    BART, padding_idx + 1 in RoBERTa). types: number of token types (BERT's two segments), 0 for none. scale: of tokens
    alone (sqrt(D) in Gemma). norm: a name in norms.NORMS (BERT, BLOOM), "" for none.
    """

    def __init__(
        self,
        *,
        vocab: int,
        embed: int,
        positions: int,
        init: str,
        offset: int = 0,
        types: int = 0,
        scale: float = 1.0,
        norm: str = "",
        norm_epsilon: float = 0.0,
    ):
        self.tokens = param((vocab, embed), axes=("vocab", "embed"), init=init)
        if positions:
            self.positions = param((positions + offset, embed), axes=("positions", "embed"), init=init)
        if types:
            self.types = param((types, embed), axes=("types", "embed"), init=init)
        if norm:
            self.norm = NORMS[norm](embed, epsilon=norm_epsilon)
        self.learned, self.offset, self.typed, self.scale, self.normed = positions > 0, offset, types > 0, scale, norm

    def __call__(
        self,
        ids_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "#B T"] | None,
        *,
        dtype: str,
        types_BT: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """positions_BT None: the index. types_BT None: type 0."""
        x_BTD = take(self.tokens, ids_BT, dtype=dtype)
        if self.scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(self.scale, dtype)  # rounded to the compute type, as Gemma was trained
        if self.typed:
            x_BTD = x_BTD + take(self.types, jnp.zeros_like(ids_BT) if types_BT is None else types_BT, dtype=dtype)
        if self.learned:
            if positions_BT is None:
                positions_BT = jnp.arange(ids_BT.shape[1], dtype=jnp.int32)[None, :]
            positions_BT = positions_BT + self.offset if self.offset else positions_BT
            x_BTD = x_BTD + take(self.positions, positions_BT, dtype=dtype)
        return self.norm(x_BTD) if self.normed else x_BTD
