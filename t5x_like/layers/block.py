"""One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)). What repeats it is stack.py.

A block says the mathematics for one layer of plain weights. It knows nothing of scanning, remat and caches' layouts;
of the depth it knows how many layers there are (for first weights) and its own number (for dropout), and of the mesh
the names of logical axes. What all layers share is computed once outside: what belongs to rows comes in `Rows`, the
rest in `Shared`.

Legend: B batch, T length, D model, N heads, K kv heads, H head size.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from t5x_like.layers.attention import attention
from t5x_like.layers.kv_cache import Cache
from t5x_like.layers.masks import MaskSpec
from t5x_like.layers.mlp import NAMES as MLP_NAMES
from t5x_like.layers.mlp import Mlp, add_bias
from t5x_like.layers.norms import NORMS, RmsNorm
from t5x_like.layers.param import ZEROS, fold, normal, param
from t5x_like.layers.positions import rotate
from t5x_like.layers.weights import einsum
from t5x_like.parallel.sharding import constrain

# The activations of a layer that have a name, by which remat can save them (stack.SAVED).
NAMES = ("q", "k", "v", "context", *MLP_NAMES)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The sizes and choices of one layer, equal for all layers of a stack.

    norm: a name in norms.NORMS. activation: a name in mlp.ACTIVATIONS. gated: activation(gate) * up. qkv_bias,
    out_bias, mlp_bias: additive vectors. qk_norm: RMS norm of each query and key head. attention_softcap c: logits
    become c * tanh(logits / c); 0 for none. dropout: share of the embedding's and of each branch's output that is set
    to zero in training (attention weights are never dropped). init_deviation: standard deviation of first weights;
    depth_scaled_init divides it by sqrt(2 layers) where a branch ends (GPT-2).
    """

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head: int
    mlp: int
    norm: str
    norm_epsilon: float
    activation: str
    gated: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_softcap: float
    dropout: float
    init_deviation: float
    depth_scaled_init: bool

    @property
    def init(self) -> str:
        return normal(self.init_deviation)

    @property
    def init_branch_end(self) -> str:
        return normal(self.init_deviation / math.sqrt(2 * self.layers)) if self.depth_scaled_init else self.init


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between layers: static, so that kernels see it.

    window: tokens, 0 for all. rope_theta: 0 without rotary positions. group: what its weights are stored under.
    """

    window: int
    rope_theta: float
    group: str = "layers"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What belongs to the rows of one call: it goes to every layer beside x, wherever the rows are.

    ropes: (cosines, sines) by theta. segments_BT: None for one segment; 0 is padding. positions_BT: given where a cache
    is read only, negative at padding; else masks go by index.
    """

    ropes: dict[float, tuple[jax.Array, jax.Array]]
    segments_BT: Int[Array, "B T"] | None
    positions_BT: Int[Array, "B T"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What all rows and layers of one call share. key: dropout, None for off."""

    key: jax.Array | None


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv 2305.13245)."""

    def __init__(self, config: BlockConfig):
        c = config
        self.q = param((c.embed, c.heads, c.head), axes=("embed", "heads", "head"), init=c.init)
        self.k = param((c.embed, c.kv_heads, c.head), axes=("embed", "kv_heads", "head"), init=c.init)
        self.v = param((c.embed, c.kv_heads, c.head), axes=("embed", "kv_heads", "head"), init=c.init)
        self.o = param((c.heads, c.head, c.embed), axes=("heads", "head", "embed"), init=c.init_branch_end)
        if c.qkv_bias:
            self.q_bias = param((c.heads, c.head), axes=("heads", "head"), init=ZEROS)
            self.k_bias = param((c.kv_heads, c.head), axes=("kv_heads", "head"), init=ZEROS)
            self.v_bias = param((c.kv_heads, c.head), axes=("kv_heads", "head"), init=ZEROS)
        if c.out_bias:
            self.o_bias = param((c.embed,), axes=("norm",), init=ZEROS)
        if c.qk_norm:
            self.q_norm = RmsNorm(c.head, epsilon=c.norm_epsilon)
            self.k_norm = RmsNorm(c.head, epsilon=c.norm_epsilon)
        self.config = c

    def __call__(
        self, x_BTD: Float[Array, "B T D"], rows: Rows, *, kind: LayerKind, index: int | Array, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """(output, the new keys and values when there is a cache)."""
        q_BTNH = self._heads(x_BTD, "q", rows, kind)
        k_BTKH = self._heads(x_BTD, "k", rows, kind)
        v_BTKH = self._heads(x_BTD, "v", rows, kind)
        scale, softcap = self.config.head**-0.5, self.config.attention_softcap or None
        mask = _mask(rows, kind)
        if cache is None:
            context_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, scale=scale, softcap=softcap)
        else:
            context_BTNH = cache.attend(q_BTNH, k_BTKH, v_BTKH, mask, layer=index, scale=scale, softcap=softcap)
        context_BTNH = checkpoint_name(constrain(context_BTNH, "batch", "length", "act_heads", "head"), "context")
        out_BTD = einsum("BTNH,NHD->BTD", context_BTNH, self.o)
        out_BTD = add_bias(out_BTD, self.o_bias) if self.config.out_bias else out_BTD
        return out_BTD, None if cache is None else (k_BTKH, v_BTKH)

    def _heads(self, x_BTD: jax.Array, name: str, rows: Rows, kind: LayerKind) -> jax.Array:
        """Queries, keys or values: projected, normalised, turned."""
        y_BTNH = einsum("BTD,DNH->BTNH", x_BTD, getattr(self, name))
        if self.config.qkv_bias:
            y_BTNH = add_bias(y_BTNH, getattr(self, f"{name}_bias"))
        if name != "v":
            if self.config.qk_norm:
                y_BTNH = getattr(self, f"{name}_norm")(y_BTNH)
            if kind.rope_theta:
                y_BTNH = rotate(y_BTNH, rows.ropes[kind.rope_theta])
        y_BTNH = constrain(y_BTNH, "batch", "length", "act_heads" if name == "q" else "act_kv_heads", "head")
        return checkpoint_name(y_BTNH, name)


def _mask(rows: Rows, kind: LayerKind) -> MaskSpec:
    """Among the tokens of this call: by position where a cache is read, else by index, which is what kernels want."""
    return MaskSpec(
        causal=True,
        window=kind.window or None,
        q_positions_BT=rows.positions_BT,
        k_positions_BS=rows.positions_BT,
        q_segments_BT=rows.segments_BT,
        k_segments_BS=rows.segments_BT,
    )


class Block(nnx.Module):
    def __init__(self, config: BlockConfig):
        c = config
        self.attention_norm = NORMS[c.norm](c.embed, epsilon=c.norm_epsilon)
        self.attention = Attention(c)
        self.mlp_norm = NORMS[c.norm](c.embed, epsilon=c.norm_epsilon)
        self.mlp = Mlp(
            embed=c.embed,
            mlp=c.mlp,
            activation=c.activation,
            gated=c.gated,
            bias=c.mlp_bias,
            init=c.init,
            init_down=c.init_branch_end,
        )
        self.dropout = c.dropout

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rows: Rows,
        shared: Shared,
        *,
        kind: LayerKind,
        index: int | Array,
        cache: Mapping[str, Any] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """(output, what stack.py collects of it). index: the layer's number, in the cache and for its dropout key."""
        key = None if shared.key is None else jax.random.fold_in(shared.key, index)
        own = None if cache is None else cache["self"]
        with jax.named_scope("attention"):
            branch_BTD, new = self.attention(self.attention_norm(x_BTD), rows, kind=kind, index=index, cache=own)
            x_BTD = x_BTD + dropout(branch_BTD, self.dropout, key, "attention")
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + dropout(self.mlp(self.mlp_norm(x_BTD)), self.dropout, key, "mlp")
        return constrain(x_BTD, "batch", "length", "act_embed"), {"cache": new, "sums": {}}


def dropout(x: jax.Array, rate: float, key: jax.Array | None, purpose: str) -> jax.Array:
    """Sets a share `rate` of x to zero and scales the rest to keep the mean; the identity without a key."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(fold(key, purpose), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))
