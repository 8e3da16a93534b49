"""Rows that branch: several continuations stand behind one common prefix, and none sees another.

A row of the model holds the prefix and then the branches, one behind the other; whatever looks at single tokens
(projections, MLP, norms) computes the prefix once. Attention alone reads each branch as a row of its own, prefix and
branch, so that every path of choice.py serves it, by index.

Legend: B rows, T length of a row, J branches of a row, A = B J rows of attention, S prefix and one branch.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from t5x_like.layers.attention.biases import Bias
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Branches:
    """prefix: tokens of each row that its branches share, padded on the left, so that distances are those of the index;
    count: branches of a row, of equal (padded) lengths."""

    prefix: int
    count: int

    def apart(self, x: Array) -> Array:
        """[B, T, ...] -> [A, S, ...]: each branch behind a copy of its prefix."""
        shared, own = x[:, : self.prefix], x[:, self.prefix :]
        own = own.reshape(len(x), self.count, -1, *x.shape[2:])
        shared = jnp.broadcast_to(shared[:, None], (len(x), self.count, *shared.shape[1:]))
        return jnp.concatenate([shared, own], axis=2).reshape(len(x) * self.count, -1, *x.shape[2:])

    def together(self, x: Array) -> Array:
        """[A, S, ...] -> [B, T, ...]: the inverse of `apart`. Copies of a prefix are equal, and the first one is
        taken."""
        x = x.reshape(-1, self.count, *x.shape[1:])
        own = x[:, :, self.prefix :]
        return jnp.concatenate([x[:, 0, : self.prefix], own.reshape(len(x), -1, *x.shape[3:])], axis=1)

    def attend(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        mask: MaskSpec,
        *,
        scale: float,
        softcap: float | None,
        bias: Bias | None,
        block: int,
    ) -> Float[Array, "B T N H"]:
        """Attention where a token sees its prefix and its branch. mask: of whole rows, by index."""
        q_ASNH = constrain(self.apart(q_BTNH), "batch", "length", "act_heads", "head")
        k_ASKH, v_ASKH = (constrain(self.apart(x), "batch", "length", "act_kv_heads", "head") for x in (k_BTKH, v_BTKH))
        context_ASNH = attention(
            q_ASNH, k_ASKH, v_ASKH, self.mask(mask), scale=scale, softcap=softcap, bias=bias, block=block
        )
        return self.together(context_ASNH)

    def mask(self, mask: MaskSpec) -> MaskSpec:
        """The mask of the rows of attention."""
        arrays = {name: getattr(mask, name) for name in ("k_prefix_BS", "q_segments_BT", "k_segments_BS")}
        return dataclasses.replace(mask, **{name: None if x is None else self.apart(x) for name, x in arrays.items()})
