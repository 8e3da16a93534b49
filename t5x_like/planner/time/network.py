"""How long a collective takes: bytes over the links that its group has, between chips (ICI) or slices (DCN).

Devices of a mesh stand at places of a torus; a group along mesh axes spans some of its dims, as rings or lines. Times
are those of the algorithms that use all links of the group at once, at LINK_SHARE of their speed, with a latency for
each hop. Copies between memories go at the memory's speed. Not here: what runs meanwhile (overlap.py), bytes and groups
(collectives.py).

Sources: "How To Scale Your Model", chapter 3, for the costs of gathering, reducing and exchanging over rings; speeds
of links in core/accelerators.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_like.core import accelerators
from t5x_like.core.accelerators import Generation
from t5x_like.planner.time.collectives import Collective
from t5x_like.planner.time.schedule import Copy

# Share of a link's speed that collectives reach, an ASSUMPTION ("How To Scale Your Model" finds 4.5e10 of v5e's 5e10).
LINK_SHARE = 0.9
HOP_SECONDS = 1e-6  # latency of a hop between chips, from the same book
DCN_SECONDS = 1e-4  # latency between slices, an ASSUMPTION

ICI, DCN = "ici", "dcn"
HBM, HOST = "hbm", "host"
# Kinds of which each device of a group keeps its own part, and sends the rest.
_OF_ALL = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
NETWORKS = (ICI, DCN, HBM, HOST)


@dataclasses.dataclass(frozen=True)
class Fabric:
    """The devices of a mesh in their networks. mesh: {axis: size} in order; places: [devices in mesh order, (slice,
    x, y, z, core)]; dims: chips along each dim of a slice; wraps: which dims are rings."""

    row: Generation
    mesh: Mapping[str, int]
    places: np.ndarray
    dims: tuple[int, ...]
    wraps: tuple[bool, ...]

    def group(self, axes: Sequence[str], size: int, devices: Sequence[int] = ()) -> np.ndarray:
        """Places of the devices of one group: those of these numbers in the mesh, where they are given; else `size`
        along `axes`, the first of them where these hold more."""
        if devices:
            return self.places[list(devices)]
        names = list(self.mesh)
        numbers = np.arange(len(self.places)).reshape(tuple(self.mesh.values()))
        chosen = [names.index(axis) for axis in axes]
        rest = [dim for dim in range(len(names)) if dim not in chosen]
        return self.places[numbers.transpose(rest + chosen).reshape(-1)[: max(size, 1)]]


def fabric(devices: Sequence[Any], mesh: Mapping[str, int]) -> Fabric:
    """Of TPU devices in mesh order, which may be those of a topology that is not there."""
    row = accelerators.of_kind(devices[0].device_kind)
    places = np.array([(getattr(d, "slice_index", 0) or 0, *d.coords, d.core_on_chip) for d in devices])
    dims = tuple(int(size) for size in places[:, 1:4].max(axis=0) - places[:, 1:4].min(axis=0) + 1)[: row.dims]
    return Fabric(row, dict(mesh), places, dims, accelerators.wraps(dims)[: row.dims])


@dataclasses.dataclass(frozen=True)
class Span:
    """What a group has of dim number `dim` of the torus: `size` chips `stride` apart, around a ring or along a line."""

    dim: int
    size: int
    stride: int
    ring: bool

    @property
    def links(self) -> float:
        """Links, one way, by which data comes in; groups that lie between each other share theirs."""
        return (2 if self.ring else 1) / self.stride

    @property
    def hops(self) -> int:
        return self.stride * (self.size // 2 if self.ring else self.size - 1)


def spans(fabric: Fabric, places: np.ndarray) -> list[Span]:
    """One for each dim that a group within a slice extends over."""
    found = []
    for dim, length in enumerate(fabric.dims):
        stands = sorted(set(places[:, 1 + dim].tolist()))
        if len(stands) > 1:
            stride = min(b - a for a, b in zip(stands, stands[1:], strict=False))
            closed = fabric.wraps[dim] and length > 2 and len(stands) * stride == length
            found.append(Span(dim, len(stands), stride, closed))
    return found


@dataclasses.dataclass(frozen=True)
class Trip:
    """One execution of a collective or copy. lanes: the links that it fills; what shares one waits for it."""

    network: str
    seconds: float
    lanes: tuple[Any, ...]


def trip(what: Collective | Copy, fabric: Fabric) -> Trip:
    """How long a collective or a copy takes, and what it keeps busy."""
    if isinstance(what, Copy):
        name = HOST if what.host else HBM
        speed = fabric.row.host if what.host else fabric.row.hbm_speed
        return Trip(name, what.bytes / (speed / fabric.row.devices), (name,))
    if what.network == DCN:  # the text says so, and whose axis it is matters not: bytes are what a device sends
        return Trip(DCN, _between_slices(what, fabric, what.group_size, 1), (DCN,))
    places = fabric.group(what.axes, what.group_size, what.devices)
    slices = len(set(places[:, 0].tolist()))
    if slices > 1:
        return Trip(DCN, _between_slices(what, fabric, slices, len(places) // slices), (DCN,))
    return _within(what, fabric, places)


def _within(collective: Collective, fabric: Fabric, places: np.ndarray) -> Trip:
    """Within a slice. A chip of two devices has its links for both of them; what passes between the two is free."""
    found, size, moved = spans(fabric, places), len(places), collective.bytes_each
    cores = len(set(places[:, 4].tolist()))
    link = fabric.row.ici * LINK_SHARE * cores / fabric.row.devices
    if not found or size < 2:
        return Trip(ICI, 0.0, ())
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return _along_one_way(collective, found, link)
    hops = sum(span.hops for span in found) * HOP_SECONDS
    lanes = tuple((span.dim, way) for span in found for way in (1, -1))
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        # A quarter of all data crosses the middle of each dim one way; the longest dim takes longest.
        return Trip(ICI, max(span.size * moved * cores / 4 / (span.links * link) for span in found) + hops, lanes)
    both_ways = 2 if collective.kind == "all-reduce" else 1
    share = (size - 1) / size
    return Trip(ICI, both_ways * (moved * share / (link * sum(span.links for span in found)) + hops), lanes)


def _along_one_way(collective: Collective, found: Sequence[Span], link: float) -> Trip:
    """Buffers that move by so many places: a link carries all those that pass it. Neighbours along several dims are
    neighbours in the last one."""
    last = found[-1]
    shifts = collective.shifts or (1,)
    hops = last.stride * max(min(abs(shift), last.size - 1) for shift in shifts)
    ways = {1 if shift > 0 else -1 for shift in shifts}
    return Trip(ICI, hops * (collective.bytes_each / link + HOP_SECONDS), tuple((last.dim, way) for way in ways))


def _between_slices(collective: Collective, fabric: Fabric, slices: int, inside: int) -> float:
    """Each device sends its part, what is left when its slice has gathered or reduced among itself: all of it to
    another slice, or what is not for its own to all. Latency grows with the logarithm of the slices."""
    both_ways = 2 if collective.kind == "all-reduce" else 1
    part = collective.bytes_each / max(inside, 1)
    share = (slices - 1) / slices if collective.kind in _OF_ALL else 1.0
    speed = fabric.row.dcn / fabric.row.devices
    return both_ways * (part * share / speed + DCN_SECONDS * math.ceil(math.log2(slices)))
