"""Attention behind one signature: which path runs is chosen by the platform of the mesh, the result is the same.

NOT here: the paths themselves (kernels.py, blockwise.py, materialised.py), of which this file only asks whether they
can serve a call.

Legend: B batch, T query length, S key length, N heads, K kv heads, H head size.
"""

from typing import Any

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5x_like.layers.attention import biases, blockwise, kernels
from t5x_like.layers.attention.biases import Bias
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.attention.materialised import attention_over_parts
from t5x_like.layers.platform import compute_capability, platform
from t5x_like.parallel.sharding import constrain


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: MaskSpec,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
    block: int = kernels.BLOCK,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention with grouped kv heads; the softmax is in float32, the output in q's dtype.

    scale multiplies the logits (usually H ** -0.5); softcap c makes them c * tanh(logits / c); then the bias is added,
    then masked. Without positions in the mask, those of the bias are indices. block: queries and keys of a block of
    a TPU's kernels. The output has the name kernels.CONTEXT for remat; where a kernel has one forward and one backward
    pass, so has what the latter reads besides.
    """
    k_BSKH, v_BSKH = checkpoint_name(k_BSKH, "k"), checkpoint_name(v_BSKH, "v")
    target, capability = platform(), compute_capability()
    name, _ = attention_path(
        q_BTNH,
        k_BSKH,
        mask,
        softcap=softcap is not None,
        bias=bias is not None,
        platform=target,
        compute_capability=capability,
    )
    if name == "splash":
        return kernels.splash(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, block=block)
    q_BTNH = checkpoint_name(q_BTNH, "q")
    if name == "cudnn":
        out_BTNH = kernels.cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, bias=bias)
    elif name == "blockwise":
        bias_1NTS = None if bias is None else biases.by_index(bias, q_BTNH.shape[1], k_BSKH.shape[1])
        out_BTNH = blockwise.blockwise(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, bias_bNTS=bias_1NTS)
    else:
        # Where the sequence is split every device needs the keys of whole rows.
        k_BSKH, v_BSKH = (constrain(x, "batch", "kv_length", "act_kv_heads", "head") for x in (k_BSKH, v_BSKH))
        out_BTNH = attention_over_parts(q_BTNH, [(k_BSKH, v_BSKH, mask)], scale=scale, softcap=softcap, bias=bias)
    return checkpoint_name(out_BTNH, kernels.CONTEXT)


def attention_path(
    q_BTNH: Any,
    k_BSKH: Any,
    mask: MaskSpec,
    *,
    softcap: bool,
    bias: bool,
    platform: str,
    compute_capability: float | None,
) -> tuple[str, str]:
    """(the path that `attention` takes, why): "splash", "cudnn", "blockwise" or "materialised".

    q_BTNH, k_BSKH: arrays, or jax.ShapeDtypeStruct; of the mask only what is static counts, and which arrays it has.
    Lengths are judged as the mesh and the rules in context split them, so call it where `attention` would be called.
    compute_capability: of an NVIDIA GPU, None if unknown.

    >>> import jax, jax.numpy as jnp
    >>> q, k = (jax.ShapeDtypeStruct((1, 4100, n, 128), jnp.bfloat16) for n in (8, 2))
    >>> mask = MaskSpec(causal=True, window=jnp.int32(64))
    >>> attention_path(q, k, mask, softcap=False, bias=False, platform="tpu", compute_capability=None)
    ('materialised', 'no splash: the window is traced; not blockwise: the window is traced')
    """
    reasons = []
    if platform == "tpu":
        why_not = kernels.why_not_splash(q_BTNH, k_BSKH, mask, bias=bias)
        if not why_not:
            return "splash", "the TPU's flash attention kernel"
        reasons.append(f"no splash: {why_not}")
    if platform == "gpu":
        why_not = kernels.why_not_cudnn(
            q_BTNH, k_BSKH, mask, softcap=softcap, bias=bias, compute_capability=compute_capability
        )
        if not why_not:
            blocks = kernels.cudnn_blocks(q_BTNH, k_BSKH, mask)
            reason = "cuDNN's flash attention kernel"
            return (
                "cudnn",
                reason if blocks == 1 else f"{reason}, its mask a matrix for each of {blocks} blocks of queries",
            )
        reasons.append(f"no cuDNN: {why_not}")
    why_not = blockwise.why_not(q_BTNH, k_BSKH, mask, softcap=softcap)
    if not why_not:
        return "blockwise", "; ".join(reasons) or "blocks of queries, each with the keys that it may see"
    return "materialised", "; ".join([*reasons, f"not blockwise: {why_not}"])
