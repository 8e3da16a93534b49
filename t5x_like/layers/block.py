"""One layer: branches (attention, cross-attention, MLP), each added to what passes through, with norms around them.

A block is the mathematics of one layer. stack.py repeats it over the layers, and does scanning and remat. A block is
told its own number, which picks its part of the cache and its dropout mask. It names logical axes and never sees the
mesh. What all layers share is computed once outside: what belongs to rows comes in `Rows`, the rest in `Shared`.

Legend: B batch, T query length, S source length, D model, N heads, K kv heads, H head size.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers.attention.biases import Bias
from t5x_like.layers.attention.branches import Branches
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.kv_cache import Cache, Cross
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.dropout import dropout
from t5x_like.layers.initialization import Initialization
from t5x_like.layers.mlp import ACTIVATIONS, Mlp, add_bias
from t5x_like.layers.norms import NORMS, RmsNorm
from t5x_like.layers.param import ZEROS, param
from t5x_like.layers.platform import in_order
from t5x_like.layers.positions import rotate
from t5x_like.layers.weights import einsum
from t5x_like.parallel.sharding import constrain

# Where the norms of a branch stand: f is the branch, x what passes from layer to layer.
PASSED = ("batch", "length", "act_embed")  # logical axes of what passes from layer to layer

NORM_ORDERS = {
    "pre": "x + f(norm(x))",
    "post": "norm(x + f(x))",  # BERT, BART
    "branch": "x + norm(f(x))",  # OLMo 2
    "sandwich": "x + after_norm(f(norm(x)))",  # Gemma 2
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The sizes and choices of one layer, equal for all layers of a stack.

    norm: a name in norms.NORMS; norm_order: a name in NORM_ORDERS. parallel: both branches read the same x (GPT-NeoX).
    activation: a name in mlp.ACTIVATIONS. gated: activation(gate) * up. qkv_bias, out_bias, mlp_bias: additive vectors
    (`attention_bias` of transformers is the first two).
    qk_norm: RMS norm of each query and key head. attention_scale: factor of the attention logits, 0 for
    head_size ** -0.5. attention_softcap c: they become c * tanh(logits / c); 0 for none.
    """

    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    norm: str
    norm_epsilon: float
    norm_order: str
    parallel: bool
    activation: str
    gated: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_scale: float
    attention_softcap: float

    @property
    def scale(self) -> float:
        """What multiplies the attention logits."""
        return self.attention_scale or self.head_size**-0.5

    def check(self, path: str) -> None:
        """Raises UsageError for names that are in no table and numbers that do not fit together."""
        for field, table in (("norm", NORMS), ("norm_order", NORM_ORDERS), ("activation", ACTIVATIONS)):
            name = getattr(self, field)
            if name not in table:
                raise UsageError(f"{path}.{field}={name!r} is unknown; {nearest(name, table)}")
        for field in ("heads", "kv_heads", "head_size", "mlp"):
            if getattr(self, field) < 1:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be at least 1")
        if not 0 < self.norm_epsilon < math.inf:
            raise UsageError(f"{path}.norm_epsilon={self.norm_epsilon:g} should be above 0")
        for field in ("attention_scale", "attention_softcap"):
            if not 0 <= getattr(self, field) < math.inf:
                raise UsageError(f"{path}.{field}={getattr(self, field):g} should be a number from 0")
        if self.heads % self.kv_heads:
            raise UsageError(
                f"{path}.kv_heads={self.kv_heads} does not divide {path}.heads={self.heads}; each key-value head "
                "serves the same number of query heads"
            )
        if self.parallel and self.norm_order != "pre":
            raise UsageError(f"{path}.parallel=True needs {path}.norm_order='pre', not {self.norm_order!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlace:
    """What a layer is told besides its config: the model's width and dropout, how weights begin, and its role.

    causal: a token sees those before it only. cross: a branch attends to the encoder's output.
    attention_block: queries and keys of a block of a TPU's kernels.
    """

    width: int
    dropout: float
    init: Initialization
    causal: bool
    cross: bool
    attention_block: int


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
class Memory:
    """The encoder's output, which cross-attention reads. segments_BS: None for one segment; 0 is padding."""

    hidden_BSD: Float[Array, "B S D"]
    segments_BS: Int[Array, "B S"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """What belongs to the rows of one call: it goes to every layer beside x, wherever the rows are.

    ropes: (cosines, sines) by theta. segments_BT: None for one segment; 0 is padding. prefix_BT: tokens that all of
    their segment see. positions_BT: given where a cache is read only, negative at padding; else masks go by index.
    memory: what cross-attention reads; None with a cache, which then holds it. numbers_B: which rows of a batch these
    are, for their dropout, where not all of them are here (stages of a pipeline); else None. branches: how the rows
    branch, None where they do not.
    """

    ropes: dict[float, tuple[jax.Array, jax.Array]]
    segments_BT: Int[Array, "B T"] | None
    prefix_BT: Bool[Array, "B T"] | None
    positions_BT: Int[Array, "B T"] | None
    memory: Memory | None
    numbers_B: UInt32[Array, " B"] | None = None
    branches: Branches | None = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What all rows and layers of one call share. bias: of the attention logits, by position. key: dropout, None for
    off."""

    bias: Bias | None
    key: jax.Array | None


class Projections(nnx.Module):
    """The weights of an attention branch, and what turns x into heads and heads into x."""

    def __init__(self, config: BlockConfig, place: BlockPlace):
        c, kv_heads, init = config, config.kv_heads, place.init
        wide, inner = place.width, c.heads * c.head_size
        self.q = param(
            (wide, c.heads, c.head_size), axes=("embed", "heads", "head"), init=init.query(wide, c.head_size)
        )
        self.k = param((wide, kv_heads, c.head_size), axes=("embed", "kv_heads", "head"), init=init.weight(wide))
        self.v = param((wide, kv_heads, c.head_size), axes=("embed", "kv_heads", "head"), init=init.weight(wide))
        self.o = param((c.heads, c.head_size, wide), axes=("heads", "head", "embed"), init=init.branch_end(inner))
        if c.qkv_bias:
            self.q_bias = param((c.heads, c.head_size), axes=("heads", "head"), init=ZEROS)
            self.k_bias = param((kv_heads, c.head_size), axes=("kv_heads", "head"), init=ZEROS)
            self.v_bias = param((kv_heads, c.head_size), axes=("kv_heads", "head"), init=ZEROS)
        if c.out_bias:
            self.o_bias = param((wide,), axes=("norm",), init=ZEROS)
        if c.qk_norm:
            self.q_norm = RmsNorm(c.head_size, epsilon=c.norm_epsilon)
            self.k_norm = RmsNorm(c.head_size, epsilon=c.norm_epsilon)
        self.config, self.block = c, place.attention_block

    @property
    def how(self) -> dict[str, Any]:
        """What `attention` is told besides arrays and their mask."""
        softcap = self.config.attention_softcap or None
        return {"scale": self.config.scale, "softcap": softcap, "block": self.block}

    def queries(self, x_BTD: jax.Array, rope: Any) -> jax.Array:
        c = self.config
        q_BTNH = _project(x_BTD, self.q, self.q_bias if c.qkv_bias else None)
        q_BTNH = self.q_norm(q_BTNH) if c.qk_norm else q_BTNH
        return _placed(q_BTNH if rope is None else rotate(q_BTNH, rope), "act_heads")

    def keys(self, x_BTD: jax.Array, rope: Any) -> jax.Array:
        c = self.config
        k_BTKH = _project(x_BTD, self.k, self.k_bias if c.qkv_bias else None)
        k_BTKH = self.k_norm(k_BTKH) if c.qk_norm else k_BTKH
        return _placed(k_BTKH if rope is None else rotate(k_BTKH, rope), "act_kv_heads")

    def values(self, x_BTD: jax.Array) -> jax.Array:
        return _placed(_project(x_BTD, self.v, self.v_bias if self.config.qkv_bias else None), "act_kv_heads")

    def output(self, context_BTNH: jax.Array) -> jax.Array:
        context_BTNH = constrain(context_BTNH, "batch", "length", "act_heads", "head")
        out_BTD = einsum("BTNH,NHD->BTD", context_BTNH, self.o)
        return add_bias(out_BTD, self.o_bias) if self.config.out_bias else out_BTD


def _project(x_BTD: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    y_BTNH = einsum("BTD,DNH->BTNH", x_BTD, weight)
    return y_BTNH if bias is None else add_bias(y_BTNH, bias)


def _placed(x_BTNH: jax.Array, heads: str) -> jax.Array:
    return constrain(x_BTNH, "batch", "length", heads, "head")


class Attention(Projections):
    """Self-attention with grouped key-value heads (arXiv 2305.13245)."""

    def __init__(self, config: BlockConfig, place: BlockPlace):
        super().__init__(config, place)
        self.causal = place.causal

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rows: Rows,
        bias: Bias | None,
        *,
        kind: LayerKind,
        index: int | Array,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """(output, the new keys and values when there is a cache)."""
        rope = rows.ropes[kind.rope_theta] if kind.rope_theta else None
        q_BTNH, k_BTKH, v_BTKH = self.queries(x_BTD, rope), self.keys(x_BTD, rope), self.values(x_BTD)
        mask = self._mask(rows, kind)
        if cache is None:
            attend = attention if rows.branches is None else rows.branches.attend
            context_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, mask, bias=bias, **self.how)
        else:
            context_BTNH = cache.attend(q_BTNH, k_BTKH, v_BTKH, mask, layer=index, bias=bias, **self.how)
        return self.output(context_BTNH), None if cache is None else (k_BTKH, v_BTKH)

    def _mask(self, rows: Rows, kind: LayerKind) -> MaskSpec:
        """Among the tokens of this call: by position where a cache is read, else by index, as kernels want it."""
        return MaskSpec(
            causal=self.causal,
            window=kind.window or None,
            k_prefix_BS=rows.prefix_BT,
            q_positions_BT=rows.positions_BT,
            k_positions_BS=rows.positions_BT,
            q_segments_BT=rows.segments_BT,
            k_segments_BS=rows.segments_BT,
        )


class CrossAttention(Projections):
    """Attention of the decoder to the encoder's output, each segment to its own (arXiv 1706.03762, section 3.2.3)."""

    def __call__(
        self, x_BTD: Float[Array, "B T D"], rows: Rows, *, index: int | Array, cache: Cross | None
    ) -> Float[Array, "B T D"]:
        q_BTNH, segments_BT, memory = self.queries(x_BTD, None), rows.segments_BT, rows.memory
        if cache is not None:
            context_BTNH = cache.attend(q_BTNH, segments_BT, layer=index, **self.how)
            return self.output(context_BTNH)
        assert memory is not None, "cross-attention reads the encoder's output, or a cache that holds it"
        if segments_BT is None and memory.segments_BS is not None:
            segments_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        if segments_BT is not None and memory.segments_BS is None:
            segments_BT = None  # one source, which every token sees
        mask = MaskSpec(causal=False, q_segments_BT=segments_BT, k_segments_BS=memory.segments_BS)
        k_BSKH, v_BSKH = self.remember(memory.hidden_BSD)
        return self.output(attention(q_BTNH, k_BSKH, v_BSKH, mask, **self.how))

    def remember(self, hidden_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of the encoder's output."""
        return self.keys(hidden_BSD, None), self.values(hidden_BSD)


class Block(nnx.Module):
    def __init__(self, config: BlockConfig, place: BlockPlace):
        c, self.order, self.parallel = config, config.norm_order, config.parallel
        after = c.norm_order == "sandwich"
        self.dropout, self.crosses = place.dropout, place.cross
        self.attention_norm = self._norm(c, place)
        self.attention = Attention(c, place)
        if after:
            self.attention_after_norm = self._norm(c, place)
        if place.cross:
            self.cross_norm = self._norm(c, place)
            self.cross = CrossAttention(c, place)
            if after:
                self.cross_after_norm = self._norm(c, place)
        self.mlp_norm = self._norm(c, place)
        self.mlp = Mlp(
            embed=place.width,
            mlp=c.mlp,
            activation=c.activation,
            gated=c.gated,
            bias=c.mlp_bias,
            init=place.init.weight(place.width),
            init_down=place.init.branch_end(c.mlp),
        )
        if after:
            self.mlp_after_norm = self._norm(c, place)

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
        own, other = (None, None) if cache is None else (cache["self"], cache.get("cross"))
        first_BTD = x_BTD
        placed = _in_order if cache is None else lambda x_BTD: x_BTD
        with jax.named_scope("attention"):
            entered_BTD = self._enter("attention", x_BTD)
            branch_BTD, new = self.attention(entered_BTD, rows, shared.bias, kind=kind, index=index, cache=own)
            x_BTD = checkpoint_name(placed(self._leave("attention", x_BTD, branch_BTD, rows, key)), "attention_out")
        if self.crosses:
            with jax.named_scope("cross"):
                branch_BTD = self.cross(self._enter("cross", x_BTD), rows, index=index, cache=other)
                x_BTD = checkpoint_name(placed(self._leave("cross", x_BTD, branch_BTD, rows, key)), "attention_out")
        with jax.named_scope("mlp"):
            branch_BTD = self.mlp(self._enter("mlp", first_BTD if self.parallel else x_BTD))
            x_BTD = placed(self._leave("mlp", x_BTD, branch_BTD, rows, key))
        return x_BTD, {"cache": new, "sums": {}}

    @staticmethod
    def _norm(config: BlockConfig, place: BlockPlace) -> nnx.Module:
        return NORMS[config.norm](place.width, epsilon=config.norm_epsilon)

    def _enter(self, branch: str, x_BTD: jax.Array) -> jax.Array:
        """What a branch reads."""
        return getattr(self, f"{branch}_norm")(x_BTD) if self.order in ("pre", "sandwich") else x_BTD

    def _leave(self, branch: str, x_BTD: jax.Array, out_BTD: jax.Array, rows: Rows, key: jax.Array | None) -> jax.Array:
        """What goes on behind a branch: x and its output, with the norm that NORM_ORDERS has there."""
        if self.order == "branch":
            out_BTD = getattr(self, f"{branch}_norm")(out_BTD)
        if self.order == "sandwich":
            out_BTD = getattr(self, f"{branch}_after_norm")(out_BTD)
        x_BTD = x_BTD + dropout(out_BTD, self.dropout, key, branch, numbers_B=rows.numbers_B)
        if self.order == "post":
            x_BTD = getattr(self, f"{branch}_norm")(x_BTD)
        return constrain(x_BTD, *PASSED)


def _in_order(x_BTD: jax.Array) -> jax.Array:
    return in_order(x_BTD, *PASSED)
