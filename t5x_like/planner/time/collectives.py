"""Collectives of a compiled program: which mesh axes they span and how many bytes they move.

Devices in HLO are numbered along the mesh that the program was jitted with (row-major over its axes), so replica
groups become names of axes. Not here: how often each one runs (cost.py).

Bytes are those of the whole buffer that one device takes part in, per execution: the output of all-gather and
collective-permute, the input of reduce-scatter, all-reduce and all-to-all. Over a ring of n devices each one sends
(n - 1)/n of that, twice for all-reduce. Padding of layouts is not counted.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_like.planner import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_OF_OUTPUT = ("all-gather", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. `count` executions a step, `bytes_each` as the head of this file says.

    `axes` are mesh axes in mesh order; `group_size` devices exchange with each other, fewer than the axes hold where
    the compiler splits an axis. `source` is the name that jax gave the operation. `network`: "ici" within a slice,
    "dcn" between slices. `shifts`: of a collective-permute, by how many places along its axes buffers move, each once,
    counted the shorter way around: (1,) for each to its next neighbour. `devices`: the numbers of one group, where it
    has fewer than its axes hold; () where these say it.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    bytes_each: int
    source: str
    network: str = "ici"
    shifts: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()


def kind_of(opcode: str) -> str | None:
    """The kind of collective that an opcode starts; None for other opcodes and for the `-done` half of a pair."""
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def read(
    instruction: hlo.Instruction, operand_shapes: Sequence[str], mesh_shape: Mapping[str, int], *, count: int
) -> Collective:
    """The facts of one collective instruction; `mesh_shape` is {axis: size} in mesh order."""
    kind = kind_of(instruction.opcode)
    assert kind is not None, instruction.opcode
    outputs = hlo.array_bytes(instruction.shape)
    inputs = tuple(size for shape in operand_shapes for size in hlo.array_bytes(shape))
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The shape of these is (inputs, outputs, context...).
        outputs = outputs[len(inputs) : 2 * len(inputs)]
    groups = groups_of(instruction.attributes, math.prod(mesh_shape.values()))
    axes, size = axes_of(groups, mesh_shape)
    is_part = size < math.prod(mesh_shape[axis] for axis in axes)
    return Collective(
        kind=kind,
        axes=axes,
        group_size=size,
        count=count,
        bytes_each=sum(outputs if kind in _OF_OUTPUT else inputs),
        source=instruction.source,
        shifts=_shifts(instruction.attributes, axes, mesh_shape),
        devices=tuple(max(groups, key=len)) if is_part else (),
    )


def _shifts(attributes: str, axes: Sequence[str], mesh_shape: Mapping[str, int]) -> tuple[int, ...]:
    """
    >>> _shifts("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", ["b"], {"a": 2, "b": 4})
    (1,)
    >>> _shifts("source_target_pairs={{0,6},{2,4},{1,7},{3,5}}", ["a"], {"a": 4, "b": 2})
    (-1, 1)
    """
    found = _PAIRS.search(attributes)
    if not found or not axes:
        return ()
    pairs = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", found.group(1))])
    names, sizes = list(mesh_shape), list(mesh_shape.values())
    chosen = [names.index(axis) for axis in axes]
    length = math.prod(sizes[dim] for dim in chosen)
    places = np.ravel_multi_index(
        [np.unravel_index(pairs, sizes)[dim] for dim in chosen], [sizes[dim] for dim in chosen]
    )
    moved = (places[:, 1] - places[:, 0]) % length
    return tuple(sorted({int(step) if step <= length / 2 else int(step) - length for step in moved}))


# Between slices. The compiler exchanges with other slices through the hosts: `send` hands a buffer to the runtime of
# several slices (megascale), `recv` takes what comes of it, and attributes of both say what is to be done.

_MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_TRANSFERS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x')
_TARGETS = re.compile(r"_xla_megascale_target=(\{.*?\}\})")
_DEVICES_OF_A_SLICE = 100_000  # device 200003 is number 3 of slice 2; slices count from 1


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One exchange between slices, which lasts from `send` and `recv` to the last of their `-done` halves.

    start, done: places of the first and the last of the four in the schedule of their computation.
    """

    collective: Collective
    send: str
    recv: str
    start: int
    done: int


def transfers(computation: hlo.Computation, mesh_shape: Mapping[str, int], *, count: int) -> list[Transfer]:
    """The exchanges between slices in a computation that runs `count` times a step, in schedule order."""
    parts: dict[str, list[tuple[int, hlo.Instruction]]] = {}
    dones: dict[str, int] = {}
    for place, instruction in enumerate(computation.instructions.values()):
        if instruction.opcode in ("send", "recv") and _MEGASCALE in instruction.attributes:
            name = _RENDEZVOUS.search(instruction.attributes)
            parts.setdefault(name.group(1) if name else instruction.name, []).append((place, instruction))
        elif instruction.opcode in ("send-done", "recv-done"):
            dones[instruction.operands[0]] = place
    found = []
    for halves in parts.values():
        both = {item.opcode: item for _, item in halves}
        if len(both) == 2:
            collective = _exchange(computation, both["send"], both["recv"], mesh_shape, count=count)
            start = min(place for place, _ in halves)
            done = max(dones.get(item.name, place) for place, item in halves)
            found.append(Transfer(collective, both["send"].name, both["recv"].name, start, done))
    return found


def _exchange(
    computation: hlo.Computation,
    send: hlo.Instruction,
    recv: hlo.Instruction,
    mesh_shape: Mapping[str, int],
    *,
    count: int,
) -> Collective:
    transfer = _TRANSFER.search(send.attributes)
    kind = _TRANSFERS.get(transfer.group(1), transfer.group(1).lower()) if transfer else "send"
    arrays = recv if kind in _OF_OUTPUT else send  # the shape of both is (buffer, context, token)
    return Collective(
        kind=kind,
        axes=(_across(mesh_shape),),
        group_size=_slices_joined(send.attributes) or mesh_shape[_across(mesh_shape)],
        count=count,
        bytes_each=hlo.array_bytes(arrays.shape)[0],
        source=_source_of(computation, send.operands[0]),
        network="dcn",
    )


def _across(mesh_shape: Mapping[str, int]) -> str:
    """The axis that joins slices, as parallel/mesh.across_slices has it.

    >>> _across({"slice": 2, "stage": 2}), _across({"slice": 1, "stage": 2})
    ('slice', 'stage')
    """
    return "stage" if mesh_shape.get("slice", 1) == 1 and mesh_shape.get("stage", 1) > 1 else "slice"


def _slices_joined(attributes: str) -> int | None:
    """How many slices exchange with each other: `{1,2}x{0:63}`, `{{100000,200000},...}` or `{{100000->200000},...}`."""
    whole = _SLICES.search(attributes)
    if whole:
        ends = [[int(end) for end in part.split(":")] for part in whole.group(1).split(",")]
        return sum(end[-1] - end[0] + 1 for end in ends)
    listed = _TARGETS.search(attributes)
    if not listed:
        return None
    groups = [
        [int(device) for device in re.findall(r"\d+", group)] for group in re.findall(r"\{([\d,>-]+)\}", listed[1])
    ]
    joined = _components([list(pair) for group in groups for pair in itertools.pairwise(group)])
    return max(len({device // _DEVICES_OF_A_SLICE for device in group}) for group in joined)


def _source_of(computation: hlo.Computation, name: str) -> str:
    """The operation that made a value; what only renames it has none."""
    while name:
        instruction = computation.instructions[name]
        if instruction.source:
            return instruction.source
        name = instruction.operands[0] if instruction.opcode != "parameter" and instruction.operands else ""
    return ""


# Groups of devices, in the four ways that HLO writes them.

_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},? ?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=\w*@?mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)
_AXIS = re.compile(r"'?([\w]+)'?(?::\((\d+)\)(\d+))?")


def groups_of(attributes: str, devices: int) -> list[list[int]]:
    """Groups of device numbers that exchange with each other.

    >>> groups_of("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4)
    [[0, 1], [2, 3]]
    """
    pairs = _PAIRS.search(attributes)
    if pairs:
        return _components([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    named = _MESH.search(attributes)
    if named:
        return _mesh_groups(*named.groups())
    iota = _IOTA.search(attributes)
    if iota:
        shape, source, order = iota.groups()
        return _iota(source, order).reshape(_ints(shape)).tolist()
    listed = _LISTED.search(attributes)
    groups = [_ints(group) for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))] if listed else []
    return groups or [list(range(devices))]  # no group written: all devices


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    dims = _ints(shape)
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(_ints(order)) if order else numbers


def _mesh_groups(axes: str, source: str | None, order: str | None, chosen: str) -> list[list[int]]:
    """`mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'b'}`: groups along some axes of a mesh named on the spot.

    An axis may be split: `'b':(2)4` is the part of size 4 that lies below a part of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w]+)'?=(\d+)", axes)}
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS.findall(chosen)]
    dims, taken = [], []
    for name, size in sizes.items():
        position = 1
        for _, before, part in sorted(item for item in parts if item[0] == name):
            dims.append(before // position)
            taken.append(len(dims))
            dims.append(part)
            position = before * part
        dims.append(size // position)
    numbers = (_iota(source, order) if source else np.arange(math.prod(sizes.values()))).reshape(dims)
    rest = [dim for dim in range(len(dims)) if dim not in taken]
    return numbers.transpose(rest + taken).reshape(-1, math.prod(dims[dim] for dim in taken)).tolist()


def _components(pairs: list[list[int]]) -> list[list[int]]:
    """Devices that are connected by (source, target) pairs."""
    group: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = group.get(source, {source}) | group.get(target, {target})
        for device in joined:
            group[device] = joined
    return [list(g) for g in {id(g): sorted(g) for g in group.values()}.values()]


def axes_of(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes along which the devices of a group differ, devices in a group).

    >>> axes_of([[0, 2], [1, 3]], {"data": 2, "fsdp": 2})
    (('data',), 2)
    """
    sizes = list(mesh_shape.values())
    axes = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), sizes), axis=1)
        axes |= {axis for axis, column in zip(mesh_shape, places.T, strict=True) if len(set(column.tolist())) > 1}
    return tuple(axis for axis in mesh_shape if axis in axes), max(len(group) for group in groups)


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of a step that are of one kind, over the same axes, groups and network."""

    kind: str
    axes: tuple[str, ...]
    group_size: int
    count: int
    bytes: int
    network: str = "ici"


def totals(collectives: Sequence[Collective]) -> tuple[Total, ...]:
    """Sums by kind, axes, group size and network, most bytes first."""

    def key(item: Collective):
        return (item.kind, item.axes, item.group_size, item.network)

    sums = []
    for (kind, axes, size, network), items in itertools.groupby(sorted(collectives, key=key), key):
        same = list(items)
        counted = sum(item.count for item in same)
        moved = sum(item.count * item.bytes_each for item in same)
        sums.append(Total(kind, axes, size, counted, moved, network))
    return tuple(sorted(sums, key=lambda total: -total.bytes))
