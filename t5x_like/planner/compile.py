"""Compiles a built step for devices that may not be there, and keeps what the compiler says of it.

It receives a jitted function and abstract arguments (shapes with shardings); what they compute is not its business.
Nothing is allocated and nothing runs.
"""

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from t5x_like.core.errors import UserError
from t5x_like.planner import cache

_LINES = "jax_traceback_in_locations_limit"
_CACHE = "jax_enable_compilation_cache"


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device in bytes, as the compiler lays it out; the runtime's own overhead is not in it.

    Outputs that overwrite donated arguments (`aliased_bytes`) are counted in both, and once in `total_bytes`.
    `peak_bytes` is the compiler's own peak, arguments included; None where it gives none.
    """

    arguments_bytes: int
    temporaries_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    peak_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        return self.arguments_bytes + self.temporaries_bytes + self.outputs_bytes - self.aliased_bytes


class DoesNotFit(UserError):
    """A program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. `text` is its scheduled HLO; seconds are of this machine."""

    text: str
    memory: Memory
    lower_seconds: float
    compile_seconds: float


def compile_program(
    step: Any,
    arguments: Sequence[Any],
    *,
    mesh: Mesh,
    options: Mapping[str, Any] | None = None,
    kept: pathlib.Path | None = None,
) -> Compiled:
    """Compiles `step(*arguments)` over `mesh`. DoesNotFit when the devices' memory is too small for it.

    step: what `jax.jit` returned, with its own shardings and donation. arguments: trees of `jax.ShapeDtypeStruct` with
    shardings on `mesh`. kept: a folder where programs that were compiled before are found, and new ones left; then
    options are those of the compiler that `step` was jitted with, which tell its programs apart.
    """
    with _without_compilation_cache(), _without_lines(), jax.set_mesh(mesh):
        lowered, lower_seconds = _timed(lambda: step.trace(*arguments).lower())
        name = ""
        if kept:
            name = cache.key(lowered.as_text(debug_info=True), devices=mesh.devices.flat, options=options or {})
        known = cache.read(kept, name) if kept else None
        if known is None:
            known = _asked(lowered)
            if kept:
                cache.write(kept, name, known)
    if known["error"]:
        raise _explained(known["error"])
    return Compiled(known["text"], Memory(**known["memory"]), lower_seconds, known["seconds"])


def _asked(lowered: Any) -> dict[str, Any]:
    """What the compiler says of a lowered program: its text and memory, or that it is too large."""
    try:
        compiled, seconds = _timed(lowered.compile)
    except jax.errors.JaxRuntimeError as error:
        explained = _explained(str(error))
        if not isinstance(explained, DoesNotFit):
            raise explained from None
        return {"error": str(error), "text": "", "memory": {}, "seconds": 0.0}
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments_bytes=stats.argument_size_in_bytes,
        temporaries_bytes=stats.temp_size_in_bytes,
        outputs_bytes=stats.output_size_in_bytes,
        aliased_bytes=stats.alias_size_in_bytes,
        peak_bytes=getattr(stats, "peak_memory_in_bytes", 0) or None,
    )
    return {"error": "", "text": compiled.as_text(), "memory": dataclasses.asdict(memory), "seconds": seconds}


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.monotonic()
    return run(), time.monotonic() - start


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """A program for absent devices goes into the cache and cannot be read from it again: a warning each time."""
    before = getattr(jax.config, _CACHE)
    jax.config.update(_CACHE, False)
    compilation_cache.reset_cache()  # jax decides once a process whether it uses the cache
    try:
        yield
    finally:
        jax.config.update(_CACHE, before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _without_lines() -> Iterator[None]:
    """Lowered programs name operations, but no lines of files: kernels hold these too, and moving a line would make
    another program."""
    before = getattr(jax.config, _LINES)
    jax.config.update(_LINES, 0)
    try:
        yield
    finally:
        jax.config.update(_LINES, before)


def _explained(message: str) -> UserError:
    """What the compiler said, in one line."""
    memory = re.search(r"required for ([\w ]+) \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if memory:
        what, needed, limit = memory.groups()
        return DoesNotFit(
            f"the program does not fit: {what} need {needed}iB of the {limit}iB HBM of a device; use more chips, a "
            "smaller batch (config.data.batch_size, --rows), more config.loop.micro_batches or another mesh"
        )
    return UserError(f"the TPU compiler fails: {' '.join(message.split())[:500]}")
