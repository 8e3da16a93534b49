"""Masks as specifications: which key each query may attend to, said by rules rather than by a matrix.

It is the one description that every attention path (XLA, splash, cuDNN) reads; `allowed` materialises it where a path
needs the matrix. It is NOT an additive bias (position biases are numbers, not masks), and never looks at token values.

Legend: B batch, T query length, S key length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The logit of what a softmax leaves out (keys that are not seen, padding of the vocabulary): far below every other, and
# finite, so that inf - inf never arises.
MASKED = -1e30
# The least value of the maximum that a softmax subtracts. Only a query that sees no key reaches it: exp(MASKED -
# NOTHING_SEEN) is 0, so that its weights are 0 instead of equal.
NOTHING_SEEN = -1e29


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """Which keys a query sees. A query that sees no key (padding) gets the output zero and gives zero gradients.

    causal: key position <= query position.
    window: query position - key position < window (causal), and the same distance to the right when not causal; None =
        no limit. A Python int is static (every path); a traced scalar (one value a layer, from scan's xs) takes the XLA
        path.
    k_prefix_BS: keys that every query of their segment sees, wherever it stands (the bidirectional prefix of a prefix
        language model, arXiv 1910.10683; packed rows hold several).
    q_positions_BT, k_positions_BS: None = the index. Give them only where the order of the index within a segment is
        not the order of positions (decoding with a cache): the kernels need the index. A negative key position is an
        empty slot. Packed training rows leave them None, since segments already separate the documents.
    q_segments_BT, k_segments_BS: None = one segment. A query sees its own segment; segment 0 is padding.
    """

    causal: bool
    window: Any = None
    k_prefix_BS: Bool[Array, "B S"] | None = None
    q_positions_BT: Int[Array, "B T"] | None = None
    k_positions_BS: Int[Array, "B S"] | None = None
    q_segments_BT: Int[Array, "B T"] | None = None
    k_segments_BS: Int[Array, "B S"] | None = None

    def __post_init__(self):
        if isinstance(self.window, int) and self.window < 1:
            raise ValueError(f"MaskSpec.window={self.window}: expected at least 1 (1 sees only the own position)")
        if (self.q_segments_BT is None) != (self.k_segments_BS is None):
            raise ValueError("MaskSpec: give q_segments_BT and k_segments_BS both or neither")

    @property
    def static_window(self) -> bool:
        """Whether the window is known when the program is built."""
        return self.window is None or isinstance(self.window, int)

    @property
    def by_index(self) -> bool:
        """Whether positions are indices, so that whole blocks of the matrix are known to be empty in advance."""
        return self.q_positions_BT is None and self.k_positions_BS is None

    def part(self, queries: slice, keys: slice) -> "MaskSpec":
        """The mask of a block; `allowed` needs its q_start and k_start where positions are indices."""
        cuts = {"_BT": queries, "_BS": keys}
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name[-3:] in cuts}
        parts = {name: None if x is None else x[:, cuts[name[-3:]]] for name, x in arrays.items()}
        return dataclasses.replace(self, **parts)

    def tree_flatten(self):
        static = self.window if self.static_window else None
        traced = None if self.static_window else self.window
        arrays = (self.k_prefix_BS, self.q_positions_BT, self.k_positions_BS)
        return (traced, *arrays, self.q_segments_BT, self.k_segments_BS), (self.causal, static)

    @classmethod
    def tree_unflatten(cls, static, children):
        traced, prefix, q_positions, k_positions, q_segments, k_segments = children
        spec = object.__new__(cls)  # children may be placeholders of a tree transform: nothing is checked here
        values = (static[0], static[1] if traced is None else traced, prefix)
        values += (q_positions, k_positions, q_segments, k_segments)
        for field, value in zip(dataclasses.fields(cls), values, strict=True):
            object.__setattr__(spec, field.name, value)
        return spec


def allowed(
    mask: MaskSpec, *, q_length: int, k_length: int, q_start: int | Array = 0, k_start: int | Array = 0
) -> Bool[Array, "#B T S"] | None:
    """The matrix of a mask, with B = 1 where no row differs; None when every query sees every key.

    q_start, k_start: index of the first query and key when the arrays at hand are a part of the row; the per-row arrays
    of the mask are already those of the part.
    """
    rules = []
    q_BT, k_BS = mask.q_positions_BT, mask.k_positions_BS
    q_BT = q_start + jnp.arange(q_length, dtype=jnp.int32)[None, :] if q_BT is None else q_BT
    k_BS = k_start + jnp.arange(k_length, dtype=jnp.int32)[None, :] if k_BS is None else k_BS
    if mask.causal or mask.window is not None:
        rules.append(_by_distance(mask, q_BT[:, :, None] - k_BS[:, None, :]))
        if mask.k_prefix_BS is not None:
            rules[-1] |= mask.k_prefix_BS[:, None, :]
    if mask.k_positions_BS is not None:
        rules.append((k_BS >= 0)[:, None, :])
    if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
        q_segments, k_segments = mask.q_segments_BT[:, :, None], mask.k_segments_BS[:, None, :]
        rules.append((q_segments == k_segments) & (k_segments != 0))
    if not rules:
        return None
    matrix = rules[0]
    for rule in rules[1:]:
        matrix = matrix & rule
    return jnp.broadcast_to(matrix, (matrix.shape[0], q_length, k_length))


def _by_distance(mask: MaskSpec, distance: Int[Array, "#B T S"]) -> Bool[Array, "#B T S"]:
    """Causality and window, from query position minus key position."""
    seen = distance >= 0 if mask.causal else jnp.ones_like(distance, dtype=bool)
    if mask.window is not None:
        seen &= distance < mask.window
        if not mask.causal:
            seen &= distance > -mask.window
    return seen


def at_least_something(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sums of weights that may be divided by: a query that sees nothing has the sum 0, and gets the output 0."""
    return jnp.where(total == 0.0, 1.0, total)
