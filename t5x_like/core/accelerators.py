"""THE table of TPU generations, and what follows from it: names, shapes, virtual machines and labels of a slice.

A slice is written `v5p:4x4x4`: the generation, and the chips along each dimension of its network. Everything else is
derived. `parse` also takes the other names that people have for a slice, such as v5p-128 and
tpu-v5p-slice:4x4x4. Not here: devices that programs compile for (planner/topology.py) and meshes over them
(parallel/mesh.py).

Sources: Google Cloud's TPU documentation for sizes, memory, peaks and speeds of memory and networks (its ICI bandwidth
of a chip is that of all links, both ways: v5p 1200 GB/s = 6 links x 2 x 100); the "How To Scale Your Model" book,
chapter 2, for v4's links, PCIe and what the documentation lacks of DCN; `cycle_flops` from what libtpu estimates for
large products (docs/planner.md); xpk 1.16 for labels, machine types and runtimes (tests/launch compares every slice
with it); libtpu for chip arrangements and for what it leaves to programs.
"""

import bisect
import dataclasses
import itertools
import math
import re

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Generation:
    """One row of the table.

    prefix: of a slice's name, which counts TensorCores: v5litepod-16
    also: other names of the generation
    gke: value of the node label cloud.google.com/gke-tpu-accelerator
    machine: machine type of a virtual machine (VM) with `chips` chips
    vm_chips: how many chips a VM may have, the smallest first; slices of more than one VM have VMs of 4
    runtime: software version of a TPU VM; "" where there are none, and GKE is the only way
    dims: of the network
    cores: TensorCores a chip
    devices: jax devices a chip; megacore is one device of two cores
    chip: libtpu's name of the core arrangement
    largest: chips of the largest slice
    sorted: whether the sizes of a 3-D slice must not decrease
    hbm: GiB of a device that the compiler gives to programs, as it says when one is too large
    kind: regular expression of jax's device_kind
    peak: dense bf16 FLOP/s of a chip
    twice_as_fast: numbers of 8 bits ("integers", "floats") that the matrix units multiply at twice the bf16 peak
    cycle_flops: dense bf16 FLOPs of a device in one cycle of the compiler's estimates
    hbm_speed: bytes a second between a chip and its memory
    ici: bytes a second of one link between neighbouring chips (interchip interconnect), one way
    dcn: bytes a second between a chip and other slices (data center network)
    host: bytes a second between a chip and its host (PCIe)
    """

    prefix: str
    also: tuple[str, ...]
    gke: str
    machine: str
    vm_chips: tuple[int, ...]
    runtime: str
    dims: int
    cores: int
    devices: int
    chip: str
    largest: int
    sorted: bool
    hbm: float
    kind: str
    peak: float
    twice_as_fast: tuple[str, ...]
    cycle_flops: int
    hbm_speed: float
    ici: float
    dcn: float
    host: float

    @property
    def clock(self) -> float:
        """Cycles a second. Estimates of products that fill the matrix units then give the peak."""
        return self.peak / self.devices / self.cycle_flops


GENERATIONS = {
    "v4": Generation(
        prefix="v4",
        also=(),
        gke="tpu-v4-podslice",
        machine="ct4p-hightpu-{chips}t",
        vm_chips=(4,),
        runtime="tpu-ubuntu2204-base",
        dims=3,
        cores=2,
        devices=1,
        chip="megacore",
        largest=4096,
        sorted=False,
        hbm=30.75,
        kind=r"TPU v4",
        peak=275e12,
        twice_as_fast=(),
        cycle_flops=262_144,
        hbm_speed=1228e9,
        ici=50e9,
        dcn=6.25e9,
        host=16e9,
    ),
    "v5e": Generation(
        prefix="v5litepod",
        also=("v5lite",),
        gke="tpu-v5-lite-podslice",
        machine="ct5lp-hightpu-{chips}t",
        vm_chips=(1, 4),
        runtime="v2-alpha-tpuv5-lite",
        dims=2,
        cores=1,
        devices=1,
        chip="default",
        largest=256,
        sorted=True,
        hbm=15.75,
        kind=r"TPU v5 lite|TPU v5e",
        peak=197e12,
        twice_as_fast=("integers",),
        cycle_flops=131_072,
        hbm_speed=819e9,
        ici=50e9,
        dcn=3.125e9,
        host=16e9,
    ),
    "v5p": Generation(
        prefix="v5p",
        also=(),
        gke="tpu-v5p-slice",
        machine="ct5p-hightpu-{chips}t",
        vm_chips=(4,),
        runtime="v2-alpha-tpuv5",
        dims=3,
        cores=2,
        devices=1,
        chip="megacore",
        largest=8960,
        sorted=True,
        hbm=95.74,
        kind=r"TPU v5p?",
        peak=459e12,
        twice_as_fast=("integers",),
        cycle_flops=262_144,
        hbm_speed=2765e9,
        ici=100e9,
        dcn=6.25e9,
        host=16e9,
    ),
    "v6e": Generation(
        prefix="v6e",
        also=("trillium",),
        gke="tpu-v6e-slice",
        machine="ct6e-standard-{chips}t",
        vm_chips=(1, 4),
        runtime="v2-alpha-tpuv6e",
        dims=2,
        cores=1,
        devices=1,
        chip="default",
        largest=256,
        sorted=True,
        hbm=31.24,
        kind=r"TPU v6 lite|TPU v6e",
        peak=918e12,
        twice_as_fast=("integers",),
        cycle_flops=524_288,
        hbm_speed=1638e9,
        ici=100e9,
        dcn=12.5e9,
        host=32e9,
    ),
    "tpu7x": Generation(
        prefix="tpu7x",
        also=("ironwood", "v7x"),
        gke="tpu7x",
        machine="tpu7x-standard-{chips}t",
        vm_chips=(1, 4),
        runtime="",
        dims=3,
        cores=2,
        devices=2,
        chip="default",
        largest=9216,
        sorted=True,
        hbm=94.74,
        kind=r"TPU7x",
        peak=2307e12,
        twice_as_fast=("floats",),
        cycle_flops=524_288,
        hbm_speed=7380e9,
        ici=100e9,
        dcn=12.5e9,
        host=32e9,
    ),
}


def of_kind(device_kind: str) -> Generation:
    """The generation of a jax device.

    >>> of_kind("TPU v5").prefix, of_kind("TPU v6 lite").prefix
    ('v5p', 'v6e')
    """
    return next(row for row in GENERATIONS.values() if re.fullmatch(row.kind, device_kind))


# A VM of several chips holds 2x2 of them. Slices below a cube of 4x4x4 have one of these shapes; above, whole cubes.
_SMALL_CUBES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_LONGEST = 256  # chips along one dimension


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that one network connects. name: of the generation; dims: chips along each dimension."""

    generation: str
    dims: tuple[int, ...]

    @property
    def row(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def spelled(self) -> str:
        """As it is written here: v5p:4x4x4."""
        return f"{self.generation}:{self.shape}"

    @property
    def shape(self) -> str:
        """As GKE's label cloud.google.com/gke-tpu-topology and gcloud's --topology have it: 4x4x4."""
        return "x".join(map(str, self.dims))

    @property
    def chips(self) -> int:
        return math.prod(self.dims)

    @property
    def devices(self) -> int:
        """jax devices."""
        return self.chips * self.row.devices

    @property
    def name(self) -> str:
        """The accelerator type, such as v5p-128: the prefix and the TensorCores. Several shapes may share it."""
        return f"{self.row.prefix}-{self.chips * self.row.cores}"

    @property
    def vm_chips(self) -> int:
        """Chips of each VM. UsageError where no VM holds so few."""
        chips = 1 if self.chips == 1 else 4
        if chips not in self.row.vm_chips:
            raise UsageError(
                f"--topology={self.spelled}: no machine of {self.generation} has {chips} chip; the smallest slice to "
                f"be had is {self.generation}:2x2x1"
            )
        return chips

    @property
    def vms(self) -> int:
        """VMs, each with one process."""
        return self.chips // self.vm_chips

    @property
    def machine(self) -> str:
        """The machine type of its VMs: ct5p-hightpu-4t."""
        return self.row.machine.format(chips=self.vm_chips)


def parse(name: str) -> Slice:
    """The slice of a name in any of these spellings; UsageError for what is none, or several.

    A shape stands behind a generation (v5p:4x4x4), the prefix of its slices' names (v5litepod:4x4), GKE's label
    (tpu-v5p-slice:4x4x4), a machine type (ct5p-hightpu-4t:4x4x4) or an accelerator type (v5p-512:4x8x8). An accelerator
    type counts TensorCores and stands alone where one shape has so many: v5p-128, v5litepod-16, v5e-16.

    >>> parse("v5p:4x4x4").name, parse("v5p:4x4x4").vms, parse("v6e:4x4").machine
    ('v5p-128', 16, 'ct6e-standard-4t')
    >>> parse("v5p-128").spelled, parse("v5e-16").spelled, parse("tpu-v6e-slice:8x8").spelled
    ('v5p:4x4x4', 'v5e:4x4', 'v6e:8x8')
    """
    head, _, shape = name.strip().lower().partition(":")
    typed = re.fullmatch(r"(.+)-(\d{1,6})", head)
    generation = _generation(head)
    if generation is None and typed:
        generation = _generation(typed.group(1))
        if generation and not shape:
            return _of_type(name, generation, int(typed.group(2)))
    if generation is None:
        raise UsageError(f"--topology={name}: {head!r} is unknown; {nearest(head, GENERATIONS)}")
    found = _of_shape(name, generation, head, shape)
    if typed and _generation(head) is None and found.chips * found.row.cores != int(typed.group(2)):
        raise UsageError(f"--topology={name}: {found.spelled} is {found.name}; write one of them alone")
    return found


def _of_shape(name: str, generation: str, head: str, shape: str) -> Slice:
    row = GENERATIONS[generation]
    if not re.fullmatch(r"[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){0,3}", shape):
        example = "4x4x4" if row.dims == 3 else "4x4"
        raise UsageError(f"--topology={name}: give the chips along each dimension, such as {head}:{example}")
    dims = tuple(int(part) for part in shape.split("x"))
    found = Slice(generation, dims)
    if _exists(row, dims):
        return found
    turned = Slice(generation, tuple(sorted(dims)))
    hint = f"write {turned.spelled}" if _exists(row, turned.dims) else f"there are {_shapes(row)}"
    raise UsageError(f"--topology={name} is no slice of {generation}; {hint}")


def _of_type(name: str, generation: str, cores: int) -> Slice:
    """The slice of so many TensorCores, where there is one such shape."""
    row = GENERATIONS[generation]
    found = [each for each in slices(generation) if each.chips * row.cores == cores]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--topology={name} has several shapes; write {' or '.join(each.spelled for each in found)}")
    counts = sorted({each.chips * row.cores for each in slices(generation)})
    near = [*counts[: bisect.bisect(counts, cores)][-1:], *counts[bisect.bisect(counts, cores) :][:1]]
    raise UsageError(
        f"--topology={name}: no slice of {generation} has {cores} TensorCores ({row.cores} a chip); the nearest are "
        f"{' and '.join(f'{row.prefix}-{count}' for count in near)}"
    )


def _generation(word: str) -> str | None:
    """The generation that a name without its numbers means: its own, a prefix, a label of GKE, a machine type."""
    for generation, row in GENERATIONS.items():
        machines = [row.machine.format(chips=chips) for chips in (1, 4, 8)]
        if word in (generation, row.prefix, row.gke, *row.also, *machines):
            return generation
    return None


def slices_named(name: str) -> list[Slice]:
    """All slices of an accelerator type: v5p-512 is 4x4x16 and 4x8x8. [] for what is no such type.

    >>> [each.spelled for each in slices_named("v5p-512")]
    ['v5p:4x4x16', 'v5p:4x8x8']
    """
    return [each for generation in GENERATIONS for each in slices(generation) if each.name == name]


def slices(generation: str) -> list[Slice]:
    """Every slice of a generation, smallest first; in 3-D each shape once, its sizes not decreasing."""
    row = GENERATIONS[generation]
    found = list(_SQUARES if row.dims == 2 else _SMALL_CUBES)
    if row.dims == 3:
        sizes = range(4, _LONGEST + 1, 4)
        cubes = (dims for dims in itertools.combinations_with_replacement(sizes, 3) if _exists(row, dims))
        found += sorted(cubes, key=lambda dims: (math.prod(dims), dims))
    return [Slice(generation, dims) for dims in found]


def device_kind(generation: str) -> str:
    """What jax calls a device of this generation, such as "TPU v5"."""
    return re.sub(r".\?$", "", GENERATIONS[generation].kind.split("|")[0])


# GiB of memory of a VM with 4 chips; a smaller one has its share.
_HOST_GIB = {"v4": 407, "v5e": 192, "v5p": 448, "v6e": 720, "tpu7x": 960}


def host_bytes(slice_: Slice) -> int:
    """Memory of each VM of a slice."""
    return chip_host_bytes(slice_) * slice_.vm_chips


def chip_host_bytes(slice_: Slice) -> int:
    """A chip's part of the memory of its VM."""
    return _HOST_GIB[slice_.generation] * 2**30 // 4


def wraps(dims: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """In which dims the network is a ring: all of a 3-D slice made of whole cubes, and those 16 long in 2-D.

    It decides more than speed: over a 4x4x4 without rings the compiler replaces all-gather by all-reduce.
    """
    if len(dims) == 2:
        return dims[0] == 16, dims[1] == 16, False
    ring = all(size % 4 == 0 for size in dims)
    return ring, ring, ring


def _exists(row: Generation, dims: tuple[int, ...]) -> bool:
    if row.dims == 2:
        return dims in _SQUARES
    cubes = all(size % 4 == 0 and size <= _LONGEST for size in dims) and math.prod(dims) <= row.largest
    in_order = not row.sorted or dims == tuple(sorted(dims))
    return len(dims) == 3 and (dims in _SMALL_CUBES or (cubes and in_order))


def _shapes(row: Generation) -> str:
    small = ", ".join("x".join(map(str, dims)) for dims in (_SQUARES if row.dims == 2 else _SMALL_CUBES))
    cubes = f", and AxBxC in multiples of 4 up to {row.largest} chips{', A <= B <= C' if row.sorted else ''}"
    return f"{small}{cubes}" if row.dims == 3 else small
