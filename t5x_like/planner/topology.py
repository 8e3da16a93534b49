"""TPU topologies that are not there: a name such as `v5p:4x4x4` becomes devices that the TPU compiler compiles for.

The compiler is in `libtpu` from PyPI, which runs on any Linux x86-64 machine. Not here: which slices there are
(core/accelerators.py) and meshes (parallel/mesh.py).
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import platform
import sys

import jax
from jax.experimental import topologies

from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError, UserError


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices` are abstract: programs compile for them and cannot run. tpu7x has two of them a chip. name: of one
    slice, as core/accelerators.py spells it; chips: of all slices; hbm_bytes: what programs may use of a device's
    memory."""

    name: str
    slices: int
    chips: int
    devices: tuple[jax.Device, ...]
    hbm_bytes: int


def topology(name: str, *, slices: int = 1) -> Topology:
    """The devices of `slices` slices `name`, which the data-centre network (DCN) joins.

    UsageError for a name that means no slice, UserError where the TPU compiler is missing or refuses.
    """
    asked = accelerators.parse(name)
    if slices < 1:
        raise UsageError(f"--slices={slices} should be a number of slices, at least 1")
    _find_compiler()
    # Without these libtpu looks for a TPU machine around it, for a minute, and says so at length.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", asked.name)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=asked.spelled,
            chip_config_name=asked.row.chip,
            chips_per_host_bounds=(1, 1, 1) if asked.chips == 1 else (2, 2, 1),
            wrap=accelerators.wraps(asked.dims),
            num_slices=slices,
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise UserError(f"--topology={name}: libtpu refuses it: {' '.join(str(error).split())[:300]}") from None
    hbm_bytes = int(asked.row.hbm * 2**30)
    return Topology(asked.spelled, slices, slices * asked.chips, tuple(description.devices), hbm_bytes)


@functools.cache
def compiler_version() -> str:
    """Of libtpu, which a nightly build calls by another name."""
    for name in ("libtpu", "libtpu-nightly"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _find_compiler() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UserError(
            f"plan needs libtpu, the TPU compiler, which exists for Linux x86-64 alone, not {sys.platform} "
            f"{platform.machine()}; run it in a Linux container"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan needs libtpu, the TPU compiler, which is not installed; pip install 't5x_like[tpu]'")
