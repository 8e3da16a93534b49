"""A mark of what a program computes, which is the same on every machine: of its lowered text and compiler options.

Programs are lowered for TPUs that are not there, in a second or two and without libtpu. The text depends on the version
of jax, and on nothing of this machine: no paths, no lines of files, no order of hashes.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from t5x_like.planner.compile import without_lines


def fingerprint(programs: Iterable[tuple[Any, Sequence[Any]]], mesh: AbstractMesh, options: Mapping[str, Any]) -> str:
    """Of jitted programs with their abstract arguments, lowered for the devices of `mesh`. options: of the compiler."""
    mark = hashlib.sha256(repr(sorted(options.items())).encode())
    with without_lines(), jax.sharding.use_abstract_mesh(mesh):
        for step, arguments in programs:
            lowered = step.trace(*arguments).lower(lowering_platforms=(mesh.abstract_device.platform,))
            mark.update(lowered.as_text().encode())
    return mark.hexdigest()[:16]
