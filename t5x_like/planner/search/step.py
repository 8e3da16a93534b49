"""A train step in numbers, and the memory of one device that follows from them: a part of the analytic model.

Memory is a sum of parts that are counted: state exactly, saved activations by what the remat policy keeps, and for the
moment of the peak one layer and the LM head at work. How long a step takes stands in analytic.py.

Legend: M tokens of one device and one micro-batch, D model, F mlp, L layers, V vocab (padded).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from t5x_like.layers import remat as remats
from t5x_like.layers.scoring.head_layout import CHUNK_BYTES
from t5x_like.models.config import ModelConfig, StackConfig
from t5x_like.parallel.rules import MAY_REPLICATE, Rules

HALF = 2  # bytes of a number in the compute type of a TPU, bfloat16
SINGLE = 4  # of float32
BIASED = ("relative", "alibi")  # positions that the attention kernels of TPUs do not know
# What remat "none" saves, in units of all named activations of a layer; fitted to compiled programs (docs/planner.md).
NONE = 2.6


@dataclasses.dataclass(frozen=True)
class Step:
    """One train step. sizes: of the mesh axes. state: {part: bytes of a device} of weights, optimizer and the like,
    counted from their shardings. gradients: bytes of a device. vmem_kib: scoped vector memory, 0 for the default.
    bubble: share of the turns of a pipeline in which a stage is idle."""

    model: ModelConfig
    rules: Rules
    sizes: Mapping[str, int]
    rows: int
    length: int
    source_length: int
    micro_batches: int
    state: Mapping[str, int]
    gradients: int
    vmem_kib: int = 0
    bubble: float = 0.0


def shards(step: Step, axis: str, dim: int = 0) -> int:
    """Into how many parts the mesh cuts a logical axis. dim: its size; key-value heads that do not divide are whole."""
    count = math.prod(step.sizes.get(name, 1) for name in step.rules.mesh_axes(axis))
    return 1 if dim and axis in MAY_REPLICATE and dim % count else count


def tokens(step: Step, length: int) -> float:
    """M: tokens of a device in one micro-batch of rows of `length`."""
    return step.rows * length / (shards(step, "batch") * shards(step, "length") * step.micro_batches)


def widths(step: Step, stack: StackConfig) -> dict[str, float]:
    """Numbers of one token that a device holds of each activation of a layer, by its point of remat; "x" is what passes
    from layer to layer."""
    heads, groups = shards(step, "act_heads"), shards(step, "act_kv_heads", stack.kv_heads)
    mlp, width = stack.mlp / shards(step, "act_mlp"), step.model.width / shards(step, "act_embed")
    query, key = stack.heads * stack.head_size / heads, stack.kv_heads * stack.head_size / groups
    found = {"x": width, "q": query, "k": key, "v": key, "context": query, "attention_out": width, "mlp_up": mlp}
    # Of a norm two numbers a token are kept, in float32, of each branch.
    return found | {"norm": 8.0} | ({"mlp_gate": mlp} if stack.gated else {})


def saved_points(policy: str) -> tuple[str, ...]:
    """The activations of a layer, beside its input x, that the policy of one layer keeps on the device; those of "none"
    are all and more."""
    if policy == "dots":
        return ("q", "k", "v", "context", "attention_out", "mlp_gate", "mlp_up")
    points = remats.SAVED.get(policy, () if policy == "none" else tuple(policy.split("+")))
    return tuple(point for point in points if not point.endswith(remats.HOST))


def found_points(policy: str) -> set[str]:
    """The points that the backward pass finds, on the device or on the host."""
    return {point.removesuffix(remats.HOST) for point in (*saved_points(policy), *policy.split("+"))}


def policies(step: Step, stack: StackConfig) -> tuple[str, ...]:
    """The policy of each layer."""
    return _by_layer(step.model.remat, stack)


@functools.lru_cache(maxsize=256)
def _by_layer(remat: str, stack: StackConfig) -> tuple[str, ...]:
    return remats.by_layer(remat, stack.kinds)


def host_bytes(step: Step, stack: StackConfig, count: float) -> float:
    """Bytes of a stack that wait on the host for the backward pass."""
    held = widths(step, stack)
    moved = [point.removesuffix(remats.HOST) for policy in policies(step, stack) for point in policy.split("+")
             if point.endswith(remats.HOST)]  # fmt: skip
    return HALF * count * sum(held.get(point, 0.0) for point in moved)


def layer_weights(step: Step, stack: StackConfig, *, crossed: bool) -> dict[str, float]:
    """Numbers in the matrices of one layer as a device multiplies with them: gathered over FSDP's axes, divided by
    tensor's."""
    width, size = step.model.width, stack.head_size
    heads, groups = shards(step, "heads"), shards(step, "kv_heads", stack.kv_heads)
    query, key = width * stack.heads * size / heads, width * stack.kv_heads * size / groups
    mlp = width * stack.mlp / shards(step, "mlp")
    branches = 2 if crossed else 1
    found = {"q": branches * query, "k": branches * key, "v": branches * key, "attention_out": branches * query}
    found |= {"mlp_up": mlp, "down": mlp}
    return found | ({"mlp_gate": mlp} if stack.gated else {})


def stacks(step: Step) -> list[tuple[StackConfig, float, bool]]:
    """(each stack, its tokens M, whether it has cross attention)."""
    two = len(step.model.stacks) == 2
    return [
        (
            stack,
            tokens(step, step.source_length if two and name == "encoder" else step.length),
            two and name == "decoder",
        )
        for name, stack in step.model.stacks.items()
    ]


# Memory.


def memory(step: Step) -> dict[str, int]:
    """Bytes of one device at the peak, by part. `state` as it is given, then:

    gradients: of all parameters, twice while micro-batches are added up
    saved: what the remat policy keeps of every layer
    layer: weights of two layers gathered, gradients of one, its activations and their gradients, and where no kernel
        runs the logits of its attention, their softmax and its gradient
    head: the head gathered, its float32 gradient, and a chunk of logits
    """
    found = {name: float(size) for name, size in step.state.items()}
    found["gradients"] = step.gradients * (2.0 if step.micro_batches > 1 else 1.0)
    found["saved"] = sum(saved_bytes(step, stack, count, crossed) for stack, count, crossed in stacks(step))
    found["layer"] = max(_working(step, stack, count, crossed) for stack, count, crossed in stacks(step))
    found["head"] = _head_bytes(step)
    return {name: round(size) for name, size in found.items()}


def saved_bytes(step: Step, stack: StackConfig, count: float, crossed: bool = False) -> float:
    """Bytes of `count` tokens that the backward pass finds of all layers of a stack."""
    held = widths(step, stack)
    every = sum(size for name, size in held.items() if name != "attention_out")
    kept = 0.0
    for policy in policies(step, stack):
        points = saved_points(policy)
        kept += NONE * every if policy == "none" else held["x"] + sum(held.get(p, 0.0) for p in points)
        if crossed:
            kept += sum(held[p] for p in ("q", "context", "attention_out") if p in points or policy == "none")
    return HALF * count * kept


def _working(step: Step, stack: StackConfig, count: float, crossed: bool) -> float:
    """Bytes of one layer while its backward pass runs."""
    weights = sum(layer_weights(step, stack, crossed=crossed).values())
    activations = count * sum(widths(step, stack).values())
    logits = 0.0
    if stack.position in BIASED:
        length = step.source_length if step.source_length and not crossed else step.length
        logits = 3 * SINGLE * count * length * stack.heads / shards(step, "act_heads")
    return HALF * (2 * weights + weights + 2 * activations) + logits


def head_weights(step: Step) -> float:
    """Numbers in the head as a device scores with it."""
    return step.model.padded_vocab * step.model.width / shards(step, "vocab")


def _all_logits(step: Step) -> float:
    return SINGLE * tokens(step, step.length) * step.model.padded_vocab / shards(step, "vocab")


def _head_bytes(step: Step) -> float:
    return (HALF + SINGLE) * head_weights(step) + min(_all_logits(step), CHUNK_BYTES)
