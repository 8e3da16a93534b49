"""Which path the attention of each stack takes for the rows of a run, and why: facts for a start screen.

The choice itself is `attention_path` (layers/attention/choice.py). This file asks it with the shapes and masks that a
stack gives it in a training step, where there is no cache.

Legend: B batch, T query length, S key length, N heads, K kv heads, H head size.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from t5x_like.layers.attention.choice import attention_path
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.models.config import StackConfig
from t5x_like.models.model import Model
from t5x_like.models.one_stack import branched
from t5x_like.parallel.sharding import use_rules


@dataclasses.dataclass(frozen=True)
class Path:
    """where: "decoder", "decoder, window 64", "decoder to encoder"; name, why: what `attention_path` says.

    shape: (B, N, T, S) of the logits of one layer, over all devices
    """

    where: str
    name: str
    why: str
    shape: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class _Call:
    """One kind of call of `attention`. tokens: what queries and keys stand for, [B, T] and [B, S]."""

    where: str
    stack: StackConfig
    tokens: tuple[Array, Array]
    mask: MaskSpec
    bias: bool


def attention_paths(
    model: Model, batch: Mapping[str, jax.ShapeDtypeStruct], *, platform: str, compute_capability: float | None
) -> list[Path]:
    """The paths for a batch of these arrays, [B, T] each, under the mesh in context.

    Raises UsageError where the mesh splits queries and keys in ways that no path serves.
    """
    found: list[Path] = []

    def look(arrays: Mapping[str, Array]) -> None:
        for call in _calls(model, arrays):
            stack, ((rows, T), (_, S)) = call.stack, (tokens.shape for tokens in call.tokens)
            name, why = attention_path(
                jnp.zeros((rows, T, stack.heads, stack.head_size), model.dtypes.compute),
                jnp.zeros((rows, S, stack.kv_heads, stack.head_size), model.dtypes.compute),
                call.mask,
                softcap=bool(stack.attention_softcap),
                bias=call.bias,
                platform=platform,
                compute_capability=compute_capability,
            )
            found.append(Path(call.where, name, why, (rows, stack.heads, T, S)))

    with use_rules(model.rules):
        jax.eval_shape(look, dict(batch))  # masks hold arrays; nothing is computed
    return found


def _calls(model: Model, arrays: Mapping[str, Array]) -> Iterator[_Call]:
    stacks = model.config.stacks
    tokens = {"decoder": "inputs", "encoder": "encoder_inputs" if len(stacks) > 1 else "inputs"}
    segments = {name: array.replace("inputs", "segment_ids") for name, array in tokens.items()}
    if not all(tokens[name] in arrays for name in stacks):
        return  # an objective that reads other arrays
    for name, stack in stacks.items():
        own, parts = arrays[tokens[name]], arrays.get(segments[name])
        if name == "decoder" and "branches" in arrays:
            own, branches = branched(own, arrays["branches"])
            assert branches is not None, "the batch has branches"
            own, parts = branches.apart(own), None if parts is None else branches.apart(parts)
        prefix = arrays.get("prefix") if name == "decoder" else None
        for window in sorted({kind.window for kind in stack.kinds}):
            mask = MaskSpec(
                causal=name == "decoder",
                window=window or None,
                k_prefix_BS=None if prefix is None else prefix > 0,
                q_segments_BT=parts,
                k_segments_BS=parts,
            )
            where = f"{name}, window {window}" if window else name
            yield _Call(where, stack, (own, own), mask, bias=stack.position in ("relative", "alibi"))
    if len(stacks) > 1:
        here, there = arrays.get(segments["decoder"]), arrays.get(segments["encoder"])
        given = here is not None and there is not None
        mask = MaskSpec(causal=False, q_segments_BT=here if given else None, k_segments_BS=there if given else None)
        both = arrays[tokens["decoder"]], arrays[tokens["encoder"]]
        yield _Call("decoder to encoder", stacks["decoder"], both, mask, bias=False)
