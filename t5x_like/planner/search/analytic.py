"""A train step estimated from sizes alone, in a tenth of a millisecond: what prunes and orders a search.

Memory is a sum of parts that are counted: state exactly, saved activations by what the remat policy keeps, and for the
moment of the peak one layer and the LM head at work. Time is that of matrix products at the chip's peak, of attention,
of what else moves through HBM, and of collectives by mesh axis, of which those of FSDP hide behind the work. A handful
of shares stand in FITTED, each with its meaning; docs/planner.md says how far all of it is from the compiler.

Legend: M tokens of one device and one micro-batch, D model, F mlp, L layers, V vocab (padded).
"""

import dataclasses
import math
from collections.abc import Mapping

from t5x_like.core import accelerators
from t5x_like.layers import remat as remats
from t5x_like.models import flops
from t5x_like.models.config import ModelConfig, StackConfig
from t5x_like.parallel.rules import MAY_REPLICATE, Rules

HALF = 2  # bytes of a number in the compute type of a TPU, bfloat16
SINGLE = 4  # of float32
LOGITS = 2**30  # bytes of a chunk of float32 logits (layers/scoring/head_layout.py)
BLOCK = 1024  # queries and keys of a block of the splash kernel (layers/attention/kernels.py)

BESIDE = ("fsdp", "data", "slice")  # axes whose collectives can run beside the work

# Shares that were fitted to compiled programs (docs/planner.md).
FITTED = {
    "products": 0.78,  # of the peak that matrix products reach with the compiler's default options
    "products_with_vmem": 0.98,  # with 64 MiB of vector memory for a fusion
    "attention": 0.5,  # of the peak that the splash kernel reaches
    "passes": 7.0,  # how often each activation of a layer goes through HBM besides (norms, rotary, copies, stacking)
    "hidden": 0.9,  # of the time of the work behind which FSDP's collectives can hide
    "none": 2.6,  # what remat "none" saves, in units of all named activations of a layer
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device can do in a second. peak: FLOP; memory: bytes of HBM; link: bytes one way over one link of the
    chip's network; dims: of that network, in chips, with rings where `wraps`; between: bytes to other slices; host:
    bytes to its host."""

    peak: float
    memory: float
    link: float
    dims: tuple[int, ...]
    wraps: tuple[bool, ...]
    between: float
    host: float


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
    )


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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device and one step. memory: {part: bytes}; seconds: {part: seconds}, `exposed` being what of the
    collectives does not hide; flops: of all products, recomputation included."""

    memory: dict[str, int]
    seconds: dict[str, float]
    collectives: dict[str, float]
    flops: float

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
    products, attention, head = products_flops(step)
    share = FITTED["products_with_vmem" if step.vmem_kib >= 32768 else "products"]
    seconds = {
        "products": products / (device.peak * share),
        "head": head / (device.peak * share),
        "attention": attention / (device.peak * FITTED["attention"]),
        "memory": _moved(step) / device.memory,
    }
    # Weights are gathered, and gradients reduced, beside the work of other layers; those of the first have none to hide
    # behind. What divides a layer itself waits.
    beside = sum(exchanged[axis] for axis in exchanged if axis in BESIDE)
    waiting = sum(exchanged[axis] for axis in exchanged if axis not in BESIDE)
    depth = sum(stack.layers for stack in step.model.stacks.values())
    seconds["bubble"] = step.bubble / (1 - step.bubble) * sum(seconds.values())
    hidden = FITTED["hidden"] * sum(seconds.values())
    offloaded = 2 * sum(_on_host(step, stack, count) for stack, count, _ in _stacks(step)) * step.micro_batches
    seconds["host"] = max(0.0, offloaded / device.host - hidden)
    seconds["exposed"] = waiting + max(beside / depth, beside - hidden)
    return Estimate(memory(step), seconds, exchanged, products + attention + head)


# Sizes.


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


def _policies(step: Step, stack: StackConfig) -> tuple[str, ...]:
    """The policy of each layer."""
    return remats.by_layer(step.model.remat, stack.kinds)


def _on_host(step: Step, stack: StackConfig, count: float) -> float:
    """Bytes of a stack that wait on the host for the backward pass."""
    held = widths(step, stack)
    moved = [point.removesuffix(remats.HOST) for policy in _policies(step, stack) for point in policy.split("+")
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


def _stacks(step: Step) -> list[tuple[StackConfig, float, bool]]:
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
    layer: weights of two layers gathered, gradients of one, and its activations and their gradients
    head: the head gathered, its float32 gradient, and a chunk of logits
    """
    found = {name: float(size) for name, size in step.state.items()}
    found["gradients"] = step.gradients * (2.0 if step.micro_batches > 1 else 1.0)
    found["saved"] = sum(saved_bytes(step, stack, count, crossed) for stack, count, crossed in _stacks(step))
    found["layer"] = max(_working(step, stack, count, crossed) for stack, count, crossed in _stacks(step))
    found["head"] = _head_bytes(step)
    return {name: round(size) for name, size in found.items()}


def saved_bytes(step: Step, stack: StackConfig, count: float, crossed: bool = False) -> float:
    """Bytes of `count` tokens that the backward pass finds of all layers of a stack."""
    held = widths(step, stack)
    every = sum(size for name, size in held.items() if name != "attention_out")
    kept = 0.0
    for policy in _policies(step, stack):
        points = saved_points(policy)
        kept += FITTED["none"] * every if policy == "none" else held["x"] + sum(held.get(p, 0.0) for p in points)
        if crossed:
            kept += sum(held[p] for p in ("q", "context", "attention_out") if p in points or policy == "none")
    return HALF * count * kept


def _working(step: Step, stack: StackConfig, count: float, crossed: bool) -> float:
    """Bytes of one layer while its backward pass runs."""
    weights = sum(layer_weights(step, stack, crossed=crossed).values())
    activations = count * sum(widths(step, stack).values())
    return HALF * (2 * weights + weights + 2 * activations)


def head_weights(step: Step) -> float:
    """Numbers in the head as a device scores with it."""
    return step.model.padded_vocab * step.model.width / shards(step, "vocab")


def _all_logits(step: Step) -> float:
    return SINGLE * tokens(step, step.length) * step.model.padded_vocab / shards(step, "vocab")


def _head_bytes(step: Step) -> float:
    return (HALF + SINGLE) * head_weights(step) + min(_all_logits(step), LOGITS)


# Operations.


def products_flops(step: Step) -> tuple[float, float, float]:
    """FLOPs of a device and a step: (products with the layers' weights, attention, the head), each with what is
    computed again.

    The last product of a layer is never computed again, since nothing in the backward pass reads it; nor is a product
    whose result is saved. Attention runs again unless its result is saved.
    """
    counted = flops.per_token(step.model, length=step.length, source_length=step.source_length)
    devices = math.prod(step.sizes.values()) / _repeated(step)
    all_tokens = step.rows * step.length / devices
    products, attention = 3 * counted.weights, 3 * counted.attention
    products += counted.weights * _again(step)
    attention += counted.attention * _attends_again(step)
    # The kernel's backward pass makes the logits again, in each of its two parts: 7 products for the forward pass' 2.
    # Blocks that a causal mask cuts are computed whole.
    attention += 1.5 * counted.attention
    if step.model.decoder is not None:
        attention *= 1 + min(BLOCK, step.length) / step.length
    return products * all_tokens, attention * all_tokens, 3 * counted.head * all_tokens


def _again(step: Step) -> float:
    """The share of the forward pass' products with weights that the backward pass computes again."""
    whole = again = 0.0
    for stack, count, crossed in _stacks(step):
        sizes = layer_weights(step, stack, crossed=crossed)
        for policy in _policies(step, stack):
            kept = {"down", *sizes} if policy == "none" else {"down", *_found(policy)}
            whole += count * sum(sizes.values())
            again += count * sum(size for name, size in sizes.items() if name not in kept)
    return again / whole


def _attends_again(step: Step) -> float:
    """The share of layers whose attention runs again in the backward pass."""
    found = [policy for stack, _, _ in _stacks(step) for policy in _policies(step, stack)]
    return sum(policy != "none" and "context" not in _found(policy) for policy in found) / len(found)


def _found(policy: str) -> set[str]:
    """The points that the backward pass finds, on the device or on the host."""
    return {point.removesuffix(remats.HOST) for point in (*saved_points(policy), *policy.split("+"))}


def _repeated(step: Step) -> int:
    """How many devices do the same work: those along axes of the mesh that divide no activation."""
    used = {name for axis in ("batch", "length", "act_heads", "act_mlp") for name in step.rules.mesh_axes(axis)}
    return math.prod(size for name, size in step.sizes.items() if name not in used)


def _moved(step: Step) -> float:
    """Bytes through HBM besides matrix products: the layers' activations, what is saved of them beside those that have
    a name, the update of every parameter, and the weights again for every further micro-batch."""
    activations = saved = weights = 0.0
    for stack, count, crossed in _stacks(step):
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
        stack.layers * sum(layer_weights(step, stack, crossed=crossed).values()) for stack, _, crossed in _stacks(step)
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
    again = 1 - sum(step.model.remat == policy for policy in ("none", "dots", "products"))
    return sum(
        stack.layers * (4 + again + (2 if crossed else 0)) * count * step.micro_batches * HALF * step.model.width
        for stack, count, crossed in _stacks(step)
    )


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
        for stack, count, _ in _stacks(step)
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
