"""TPU topologies that are not there: a name such as `v5p:4x4x4` becomes devices that the TPU compiler compiles for.

The compiler is in `libtpu` from PyPI, which runs on any Linux x86-64 machine. Not here: meshes (parallel/mesh.py)
and what chips cost, reach or hold.
"""

import dataclasses
import importlib.util
import math
import os
import platform
import re
import sys

import jax
from jax.experimental import topologies

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError


@dataclasses.dataclass(frozen=True)
class _Generation:
    """A TPU generation. `chip` is libtpu's name of its core arrangement: megacore is one device of two cores.

    hbm: GiB of a device that the compiler gives to programs, as it says when one is too large.
    """

    prefix: str
    dims: int
    cores: int
    chip: str
    largest: int
    hbm: float


# Sizes and prefixes: Google Cloud TPU documentation and xpk; wrap-around and chip arrangements as MaxText compiles.
_GENERATIONS = {
    "v4": _Generation(prefix="v4", dims=3, cores=2, chip="megacore", largest=4096, hbm=30.75),
    "v5e": _Generation(prefix="v5litepod", dims=2, cores=1, chip="default", largest=256, hbm=15.75),
    "v5p": _Generation(prefix="v5p", dims=3, cores=2, chip="megacore", largest=8960, hbm=95.73),
    "v6e": _Generation(prefix="v6e", dims=2, cores=1, chip="default", largest=256, hbm=31.24),
    "tpu7x": _Generation(prefix="tpu7x", dims=3, cores=2, chip="default", largest=9216, hbm=94.74),
}
_SMALL_CUBES = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices` are abstract: programs compile for them and cannot run. tpu7x has two of them a chip. hbm_bytes: what
    programs may use of a device's memory."""

    name: str
    chips: int
    devices: tuple[jax.Device, ...]
    hbm_bytes: int


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """(generation, chips along each dim of the network); UsageError for what is no slice of that generation.

    >>> parse("v5p:4x4x4")
    ('v5p', (4, 4, 4))
    """
    generation, _, shape = name.partition(":")
    if generation not in _GENERATIONS:
        raise UsageError(f"--topology={name}: {generation!r} is unknown; {nearest(generation, _GENERATIONS)}")
    known = _GENERATIONS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        example = "4x4x4" if known.dims == 3 else "4x4"
        raise UsageError(f"--topology={name}: give the chips along each dimension, such as {generation}:{example}")
    dims = tuple(int(part) for part in shape.split("x"))
    if known.dims == 2 and dims not in _SQUARES:
        sizes = ", ".join("x".join(map(str, square)) for square in _SQUARES)
        raise UsageError(f"--topology={name} is no slice of {generation}; there are {sizes}")
    cubes = all(size % 4 == 0 for size in dims) and math.prod(dims) <= known.largest
    if known.dims == 3 and not (len(dims) == 3 and (cubes or dims in _SMALL_CUBES)):
        sizes = ", ".join("x".join(map(str, cube)) for cube in _SMALL_CUBES)
        raise UsageError(
            f"--topology={name} is no slice of {generation}; there are {sizes}, "
            f"and AxBxC in multiples of 4 up to {known.largest} chips"
        )
    return generation, dims


def wraps(dims: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """In which dims the network is a ring: all of a 3-D slice made of whole cubes, and those 16 long in 2-D.

    It decides more than speed: over a 4x4x4 without rings the compiler replaces all-gather by all-reduce.
    """
    if len(dims) == 2:
        return dims[0] == 16, dims[1] == 16, False
    ring = all(size % 4 == 0 for size in dims)
    return ring, ring, ring


def topology(name: str) -> Topology:
    """The devices of the topology `name`; UserError where the TPU compiler is missing or refuses."""
    generation, dims = parse(name)
    known = _GENERATIONS[generation]
    _find_compiler()
    chips = math.prod(dims)
    # Without these libtpu looks for a TPU machine around it, for a minute, and says so at length.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{known.prefix}-{chips * known.cores}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{generation}:{'x'.join(map(str, dims))}",
            chip_config_name=known.chip,
            chips_per_host_bounds=(1, 1, 1) if chips == 1 else (2, 2, 1),
            wrap=wraps(dims),
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology={name}: libtpu refuses it: {' '.join(str(error).split())[:300]}") from None
    return Topology(name, chips, tuple(description.devices), int(known.hbm * 2**30))


def _find_compiler() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UserError(
            f"plan needs libtpu, the TPU compiler, which exists for Linux x86-64 alone, not {sys.platform} "
            f"{platform.machine()}; run it in a Linux container"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan needs libtpu, the TPU compiler, which is not installed; pip install 't5x_like[tpu]'")
