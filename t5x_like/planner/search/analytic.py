"""A train step estimated from sizes alone, in about a millisecond: what prunes and orders a search.

Time is that of matrix products at the chip's peak, of attention by the roofline of its kernels, of what else moves
through HBM, and of collectives by mesh axis, of which those of FSDP hide behind the work. A handful of shares stand in
FITTED, each with its meaning; docs/planner.md says how far all of it is from the compiler. Sizes and memory stand in
step.py.

Legend: M tokens of one device and one micro-batch.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from t5x_like.core import accelerators
from t5x_like.layers.attention import kernels as attention_kernels
from t5x_like.layers.attention import splash_mask
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.models import flops
from t5x_like.planner.search.step import (
    BIASED,
    HALF,
    SINGLE,
    Step,
    found_points,
    head_weights,
    host_bytes,
    layer_weights,
    memory,
    policies,
    saved_bytes,
    shards,
    stacks,
    widths,
)
from t5x_like.planner.time import kernels

BESIDE = ("fsdp", "data", "slice")  # axes whose collectives can run beside the work

# Shares that were fitted to compiled programs (docs/planner.md).
FITTED = {
    "products": 0.78,  # of the peak that matrix products reach with the compiler's default options
    "products_with_vmem": 0.98,  # with 64 MiB of vector memory for a fusion
    "passes": 7.0,  # how often each activation of a layer goes through HBM besides (norms, rotary, copies, stacking)
    "hidden": 0.9,  # of the time of the work behind which FSDP's collectives can hide
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do in a second. peak: FLOP; memory: bytes of HBM; link: bytes one way over one link of the
    chip's network; dims: of that network, in chips, with rings where `wraps`; between: bytes to other slices; host:
    bytes to its host; host_memory: its part of that host's memory. row: of the table of generations."""

    peak: float
    memory: float
    link: float
    dims: tuple[int, ...]
    wraps: tuple[bool, ...]
    between: float
    host: float
    host_memory: float
    row: accelerators.Generation


def device(topology: accelerators.Slice) -> Device:
    """A device of a topology; two of them share a chip of tpu7x."""
    row = topology.row
    wraps = accelerators.wraps(topology.dims)[: len(topology.dims)]
    return Device(
        row.peak / row.devices,
        row.hbm_speed / row.devices,
        row.ici / row.devices,
        topology.dims,
        wraps,
        row.dcn / row.devices,
        row.host / row.devices,
        accelerators.chip_host_bytes(topology) / row.devices,
        row,
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step. memory: {part: bytes}; seconds: {part: seconds}, `exposed` and `host` being what of
    the collectives and of the traffic with the host does not hide; flops: of all products, recomputation included;
    on_host: bytes of activations that wait in the host's memory."""

    memory: dict[str, int]
    seconds: dict[str, float]
    collectives: dict[str, float]
    flops: float
    on_host: int

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound_by(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def estimate(step: Step, device: Device) -> Estimate:
    """Memory and time of a train step, without compiling it."""
    exchanged = collectives(step, device)
    products, head = products_flops(step)
    attended = attention(step, device.row)
    share = FITTED["products_with_vmem" if step.vmem_kib >= 32768 else "products"]
    seconds = {
        "products": products / (device.peak * share),
        "head": head / (device.peak * share),
        "attention": attended.seconds,
        "memory": _moved(step) / device.memory,
    }
    # Weights are gathered, and gradients reduced, beside the work of other layers; those of the first have none to hide
    # behind. What divides a layer itself waits.
    beside = sum(exchanged[axis] for axis in exchanged if axis in BESIDE)
    waiting = sum(exchanged[axis] for axis in exchanged if axis not in BESIDE)
    depth = sum(stack.layers for stack in step.model.stacks.values())
    seconds["bubble"] = step.bubble / (1 - step.bubble) * sum(seconds.values())
    hidden = FITTED["hidden"] * sum(seconds.values())
    # There and back again, in every micro-batch, beside the work.
    on_host = sum(host_bytes(step, stack, count) for stack, count, _ in stacks(step))
    seconds["host"] = max(0.0, 2 * on_host * step.micro_batches / device.host - hidden)
    seconds["exposed"] = waiting + max(beside / depth, beside - hidden)
    return Estimate(memory(step), seconds, exchanged, products + attended.flops + head, round(on_host))


# Operations.


def products_flops(step: Step) -> tuple[float, float]:
    """FLOPs of a device and a step: (products with the layers' weights, the head), with what is computed again.

    The last product of a layer is never computed again, since nothing in the backward pass reads it; nor is a product
    whose result is saved.
    """
    counted = flops.per_token(step.model, length=step.length, source_length=step.source_length)
    devices = math.prod(step.sizes.values()) / _repeated(step)
    all_tokens = step.rows * step.length / devices
    return counted.weights * (3 + _again(step)) * all_tokens, 3 * counted.head * all_tokens


def _again(step: Step) -> float:
    """The share of the forward pass' products with weights that the backward pass computes again."""
    whole = again = 0.0
    for stack, count, crossed in stacks(step):
        sizes = layer_weights(step, stack, crossed=crossed)
        for policy in policies(step, stack):
            kept = {"down", *sizes} if policy == "none" else {"down", *found_points(policy)}
            whole += count * sum(sizes.values())
            again += count * sum(size for name, size in sizes.items() if name not in kept)
    return again / whole


def _attends_again(step: Step) -> float:
    """The share of layers whose attention runs again in the backward pass."""
    found = [policy for stack, _, _ in stacks(step) for policy in policies(step, stack)]
    return sum(map(_runs_again, found)) / len(found)


def _runs_again(policy: str) -> bool:
    """Whether the backward pass of a layer runs the kernel of its forward pass."""
    return policy != "none" and "context" not in found_points(policy)


@dataclasses.dataclass(frozen=True)
class _Attended:
    flops: float
    seconds: float


def attention(step: Step, row: accelerators.Generation) -> _Attended:
    """Of a device and a step: the kernels of all layers, forward, backward, and forward again unless that is saved."""
    calls: collections.Counter[kernels.Attention] = collections.Counter()
    for name, (stack, count, crossed) in zip(step.model.stacks, stacks(step), strict=True):
        length = step.source_length if len(step.model.stacks) == 2 and name == "encoder" else step.length
        rows = count * shards(step, "length") / length
        heads = max(round(rows * stack.heads / shards(step, "act_heads")), 1)
        alike = collections.Counter(zip(stack.kinds, map(_runs_again, policies(step, stack)), strict=True))
        for (kind, again), layers in alike.items():
            masks = [(length, length, name == "decoder", kind.window, stack.position in BIASED)]
            masks += [(length, step.source_length, False, 0, False)] if crossed else []
            for mask in masks:
                for which, times in (("fwd", 1 + again), ("dq", 1), ("dkv", 1)):
                    shape = _blocks(which, *mask, shards(step, "length"), step.model.attention_block)
                    calls[kernels.Attention(which, heads, *shape, stack.head_size)] += (
                        times * layers * step.micro_batches
                    )
    found = [(call.roofline(row), times) for call, times in calls.items()]
    return _Attended(
        sum(each.flops * times for each, times in found), sum(each.seconds * times for each, times in found)
    )


@functools.lru_cache(maxsize=4096)
def _blocks(
    which: str, length: int, keys: int, causal: bool, window: int, biased: bool, parts: int, block: int
) -> tuple[tuple[int, int], tuple[int, int], float, int]:
    """(block, grid, blocks that are computed, steps of the grid) of one head of a kernel, as its roofline reads them
    from the program. parts: into how many the queries of a row are cut.

    Where no kernel can run the whole is one block, of which what the mask leaves is computed, in no steps.
    """
    queries = length // parts
    if biased or length != keys or queries % attention_kernels.LANES:
        seen = flops.keys_seen(length, window, causal=causal) / keys if length == keys else 1.0
        return (queries, keys), (1, 1), seen, 0
    exchanged = splash_mask.exchanges(
        MaskSpec(causal=causal, window=window or None), length, shards=parts, multiple=attention_kernels.LANES
    )
    sizes = attention_kernels.block_sizes(queries // (2 if exchanged else 1), block)
    tall, wide = {
        "fwd": (sizes.block_q, sizes.block_kv),
        "dq": (sizes.block_q_dq, sizes.block_kv_dq),
        "dkv": (sizes.block_q_dkv, sizes.block_kv_dkv),
    }[which]
    rows, columns = queries // tall, keys // wide
    block_of = (tall, wide), (rows, columns)
    if not causal and not window:
        return *block_of, rows * columns, rows * columns
    if which != "dkv":
        width = min(_reach(tall, wide, window), columns)
        return *block_of, kernels.count_blocks(rows, columns, (tall, wide), width), rows * width
    width = min(_reach(wide, tall, window), rows)
    if width < rows:  # of a window, counted by blocks of keys
        return *block_of, kernels.count_blocks(columns, rows, (wide, tall), width), columns * width
    return *block_of, kernels.count_blocks(rows, columns, (tall, wide), columns), columns * width


def _reach(tall: int, wide: int, window: int) -> Any:
    """Blocks of `wide` tokens that a block of `tall` sees through a window, at most; all of them without one."""
    if not window:
        return math.inf
    starts = range(0, math.lcm(tall, wide), tall)
    return max((start + tall - 1) // wide - (start - window + 1) // wide + 1 for start in starts)


def _repeated(step: Step) -> int:
    """How many devices do the same work: those along axes of the mesh that divide no activation."""
    used = {name for axis in ("batch", "length", "act_heads", "act_mlp") for name in step.rules.mesh_axes(axis)}
    return math.prod(size for name, size in step.sizes.items() if name not in used)


def _moved(step: Step) -> float:
    """Bytes through HBM besides matrix products: the layers' activations, what is saved of them beside those that have
    a name, the update of every parameter, and the weights again for every further micro-batch."""
    activations = saved = weights = 0.0
    for stack, count, crossed in stacks(step):
        named = stack.layers * HALF * count * sum(widths(step, stack).values())
        activations += step.micro_batches * named
        saved += 2 * step.micro_batches * max(0.0, saved_bytes(step, stack, count, crossed) - named)
        weights += stack.layers * sum(layer_weights(step, stack, crossed=crossed).values())
    again = (step.micro_batches - 1) * 2 * (HALF * (weights + head_weights(step)) + step.gradients)
    return FITTED["passes"] * activations + saved + again + 2.0 * (sum(step.state.values()) + step.gradients)


# The network.


def collectives(step: Step, device: Device) -> dict[str, float]:
    """Seconds of a step by mesh axis, as if nothing ran beside them."""
    found = {axis: 0.0 for axis, size in step.sizes.items() if size > 1}
    batch = set(step.rules.mesh_axes("batch"))
    gathered = [axis for axis in step.rules.mesh_axes("embed") if step.sizes.get(axis, 1) > 1]
    layers = sum(
        stack.layers * sum(layer_weights(step, stack, crossed=crossed).values()) for stack, _, crossed in stacks(step)
    )
    weights = head_weights(step) + layers / shards(step, "layers")
    divided = math.prod(step.sizes[axis] for axis in gathered)
    for axis in found:
        if axis == "stage":
            continue  # one activation a turn, to a neighbour
        speed = bandwidth(step.sizes, axis, device)
        size = step.sizes[axis]
        ring = (size - 1) / size / speed
        if axis in gathered:
            # Each device gathers in the forward and in the backward pass and reduces gradients, in every micro-batch.
            found[axis] += step.micro_batches * 3 * HALF * weights * ring / _later(step, gathered, axis)
        elif axis in batch:
            found[axis] += step.micro_batches * 2 * SINGLE * weights / divided * ring
        if axis in step.rules.mesh_axes("act_mlp") or axis in step.rules.mesh_axes("act_heads"):
            found[axis] += _tensor_bytes(step) * 2 * ring
        if axis in step.rules.mesh_axes("length"):
            found[axis] += _sequence_bytes(step) * ring
            if axis not in gathered:
                found[axis] += step.micro_batches * 2 * SINGLE * weights / divided * ring
    return found


def _later(step: Step, gathered: list[str], axis: str) -> int:
    """A weight on several axes is gathered over the last one first: over that, parts are smaller by the others."""
    return math.prod(step.sizes[name] for name in gathered[: gathered.index(axis)])


def _tensor_bytes(step: Step) -> float:
    """Bytes that are all-reduced over tensor: two outputs of a layer forward, two gradients backward, and the first
    output again unless it is saved."""
    total = 0.0
    for stack, count, crossed in stacks(step):
        again = sum(p != "none" and "attention_out" not in found_points(p) for p in policies(step, stack))
        sums = stack.layers * (6 if crossed else 4) + again
        total += sums * count * step.micro_batches * HALF * step.model.width
    return total


def _sequence_bytes(step: Step) -> float:
    """Bytes of the keys and values of whole rows that each layer gathers, again for its recomputation, and whose
    gradients it scatters."""
    again = _attends_again(step)
    return sum(
        stack.layers
        * (3 + again)
        * step.micro_batches
        * HALF
        * count
        * shards(step, "length")
        * 2
        * widths(step, stack)["k"]
        for stack, count, _ in stacks(step)
    )


def bandwidth(sizes: Mapping[str, int], axis: str, device: Device) -> float:
    """Bytes a second that a device sends along a mesh axis.

    The last axes of the mesh lie on the nearest neighbours: each takes dims of the network, both ways around where it
    has a whole ring, one way where it has a part of a dim. An axis of several dims uses all of their links.
    """
    if axis == "slice":
        return device.between
    left = sorted(each for each in zip(device.dims, device.wraps, strict=True) if each[0] > 1)
    for name in reversed([name for name in sizes if sizes[name] > 1 and name != "slice"]):
        size, lanes = sizes[name], 0.0
        while size > 1 and left:
            dim, ring = left.pop(0)
            if size >= dim:
                lanes += 2.0 if ring else 1.0
                size = -(-size // dim)
            else:
                lanes += 1.0
                left.insert(0, (dim // size, False))
                size = 1
        if name == axis:
            return max(lanes, 1.0) * device.link
    return device.link
