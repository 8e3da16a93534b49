"""Compiles a built step for devices that may not be there, and keeps what the compiler says of it.

It receives a jitted function and abstract arguments (shapes with shardings); what they compute is not its business.
Nothing is allocated and nothing runs.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from t5x_like.core.errors import UserError
from t5x_like.core.terminal import format_bytes
from t5x_like.planner import cache
from t5x_like.planner.memory import peak as memory
from t5x_like.planner.memory.peak import Held
from t5x_like.planner.time.regions import classify

_NAMED = 3  # buffers in the line of a refusal
_LINES = "jax_traceback_in_locations_limit"
_CACHE = "jax_enable_compilation_cache"


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device in bytes, as the compiler lays it out; the runtime's own overhead is not in it.

    Outputs that overwrite donated arguments (`aliased_bytes`) are counted in both. `peak_bytes` is the compiler's word
    on the most that lives at once, arguments and outputs included, and the vector memory too: by this it takes or
    refuses a program. `needed_bytes` is the same without the vector memory. `temporaries_bytes` is what XLA calls
    temp_size, which may be half as much again as ever lives at once.
    """

    arguments_bytes: int
    temporaries_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    peak_bytes: int | None = None
    needed_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """The HBM that a device must have for it."""
        if self.needed_bytes is not None:
            return self.needed_bytes
        return self.arguments_bytes + self.temporaries_bytes + self.outputs_bytes - self.aliased_bytes


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program. `text` is its scheduled HLO; seconds are of this machine."""

    text: str
    memory: Memory
    lower_seconds: float
    compile_seconds: float

    @functools.cached_property
    def held(self) -> Held:
        """What its memory is made of; memory.NOTHING where its text is not understood."""
        return memory.held_or_nothing(self.text)


class DoesNotFit(UserError):
    """A program needs more memory than a device has. compiled: the program all the same, where that was asked for and
    the compiler could; listed: the largest buffers, as far as they are known."""

    def __init__(self, message: str, *, compiled: Compiled | None = None, listed: Sequence[memory.Large] = ()) -> None:
        super().__init__(message)
        self.compiled = compiled
        self.listed = tuple(listed)


def compile_program(
    step: Any,
    arguments: Sequence[Any],
    *,
    mesh: Mesh,
    options: Mapping[str, Any] | None = None,
    kept: pathlib.Path | None = None,
    anyway: bool = False,
    stage: Callable[[str], contextlib.AbstractContextManager] = lambda doing: contextlib.nullcontext(),
) -> Compiled:
    """Compiles `step(*arguments)` over `mesh`. DoesNotFit when the devices' memory is too small for it.

    step: what `jax.jit` returned, with its own shardings and donation. arguments: trees of `jax.ShapeDtypeStruct` with
    shardings on `mesh`. kept: a folder where programs that were compiled before are found, and new ones left; then
    options are those of the compiler that `step` was jitted with, which tell its programs apart. anyway: of a program
    that does not fit, DoesNotFit has what it would be; finding out takes as long as the refusal. stage: is entered for
    each action that takes long, which it is given as a word.
    """
    with _without_compilation_cache(), without_lines(), jax.set_mesh(mesh):
        with stage("lowering"):
            lowered, lower_seconds = _timed(lambda: step.trace(*arguments).lower())
        name = ""
        if kept:
            name = cache.key(lowered.as_text(debug_info=True), devices=mesh.devices.flat, options=options or {})
        known = cache.read(kept, name) if kept else None
        if known is None or (anyway and known["error"] and not known["text"] and not known.get("looked")):
            known = _asked(lowered, stage, anyway=anyway)
            if kept:
                cache.write(kept, name, known)
    compiled = _compiled(known, lower_seconds) if known["text"] else None
    if known["error"]:
        raise _explained(known["error"], compiled)
    assert compiled is not None
    return compiled


def _compiled(known: Mapping[str, Any], lower_seconds: float) -> Compiled:
    """A program of what is kept of it."""
    fields = {field.name for field in dataclasses.fields(Memory)}
    sizes = Memory(**{name: value for name, value in known["memory"].items() if name in fields})
    found = Compiled(known["text"], sizes, lower_seconds, known["seconds"])
    needed = _needed(sizes.peak_bytes, found.held)
    again = dataclasses.replace(found, memory=dataclasses.replace(sizes, needed_bytes=needed))
    vars(again)["held"] = found.held  # which takes seconds, and does not depend on the sizes
    return again


def _needed(peak_bytes: int | None, held: Held) -> int | None:
    """The compiler's peak without the vector memory, which it counts, and with all arguments, which it does not count
    once they are read for the last time (when it refuses, it does): what we read, if these two explain the rest, to 1%.
    Else the compiler's own."""
    if held is memory.NOTHING or peak_bytes is None:
        return held.peak_bytes or peak_bytes
    least, most = held.read_peak_bytes - 0.01 * peak_bytes, held.peak_bytes + held.vector_bytes + 0.01 * peak_bytes
    return held.peak_bytes if least <= peak_bytes <= most else peak_bytes


def _asked(lowered: Any, stage: Callable[[str], contextlib.AbstractContextManager], *, anyway: bool) -> dict[str, Any]:
    """What the compiler says of a lowered program: its text and memory, or that it is too large, or both."""
    begin = time.monotonic()
    try:
        with stage("compiling"):
            compiled, seconds = _timed(lowered.compile)
    except jax.errors.JaxRuntimeError as refusal:
        explained = _explained(str(refusal), None)
        if not isinstance(explained, DoesNotFit):
            raise explained from None
        refused = {"error": str(refusal), "text": "", "memory": {}, "seconds": time.monotonic() - begin}
        if not anyway:
            return refused
        with stage("looking at what is large in"):
            text = _refused(lowered)
        sizes = _of_text(text) if text else None
        refused["looked"] = True  # so that nobody does it again
        return refused | ({} if sizes is None else {"text": text, "memory": sizes})
    stats = compiled.memory_analysis()
    sizes = Memory(
        arguments_bytes=stats.argument_size_in_bytes,
        temporaries_bytes=stats.temp_size_in_bytes,
        outputs_bytes=stats.output_size_in_bytes,
        aliased_bytes=stats.alias_size_in_bytes,
        peak_bytes=getattr(stats, "peak_memory_in_bytes", 0) or None,
    )
    return {"error": "", "text": compiled.as_text(), "memory": _kept(sizes), "seconds": seconds}


def _refused(lowered: Any) -> str:
    """The text of a program that the compiler refuses for its size: one of the files that it can be asked for."""
    with tempfile.TemporaryDirectory(prefix="t5x_like_plan_") as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            lowered.compile(compiler_options=options)
        found = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        return found[-1].read_text() if found else ""


def _of_text(text: str) -> dict[str, Any] | None:
    """The memory of a program that is nothing but a text; None where this is not understood."""
    found = memory.held_or_nothing(text)
    if found is memory.NOTHING:
        return None
    rest = found.peak_bytes - found.arguments_bytes - found.outputs_bytes + found.aliased_bytes
    sizes = (found.arguments_bytes, rest, found.outputs_bytes, found.aliased_bytes, found.peak_bytes)
    return _kept(Memory(*sizes))


def _kept(sizes: Memory) -> dict[str, Any]:
    """What the compiler said; what follows from it is worked out again."""
    return {name: value for name, value in dataclasses.asdict(sizes).items() if name != "needed_bytes"}


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
def without_lines() -> Iterator[None]:
    """Lowered programs name operations, but no lines of files: kernels hold these too, and moving a line would make
    another program."""
    before = getattr(jax.config, _LINES)
    jax.config.update(_LINES, 0)
    try:
        yield
    finally:
        jax.config.update(_LINES, before)


_REQUIRED = (
    r"required for (?P<what>[\w ]+) \((?P<needed>[\d.]+[KMGT])\) exceeds available HBM \((?P<limit>[\d.]+[KMGT])\)",
    r"Ran out of memory in memory space (?P<what>hbm)\. Used (?P<needed>[\d.]+[KMGT]) of (?P<limit>[\d.]+[KMGT]) hbm",
)
# Of the list "Largest program allocations in hbm" that some refusals have.
_ALLOCATION = re.compile(r"\d+\. Size: ([\d.]+)([KMGT])(.*?)(?=\n *\d+\. Size: |\n *={5}|\Z)", re.DOTALL)
_ALONE = re.compile(
    r"Allocation \(size=(\d+)\) would exceed memory .*?\[shape: (\w+\[[\d,]*\])[^:]*:?[^\]]*\].*?:: ([\w.\-]+)",
    re.DOTALL,
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _explained(message: str, compiled: Compiled | None) -> UserError:
    """What the compiler said, in one line; of a program that is too large, with its largest buffers."""
    memory = next((found for form in _REQUIRED if (found := re.search(form, message))), None)
    if not memory:
        return UserError(f"the TPU compiler fails: {' '.join(message.split())[:500]}")
    listed = compiled.held.largest if compiled else allocations(message)
    named = ", ".join(_in_words(item) for item in listed[:_NAMED])
    what = "all buffers" if memory["what"] == "hbm" else memory["what"]
    return DoesNotFit(
        f"the program does not fit: {what} need {memory['needed']}iB of the {memory['limit']}iB HBM of a device"
        f"{f', the largest being {named}' if named else ''}; use more chips, a smaller batch (config.data.batch_size, "
        "--rows), more config.loop.micro_batches or another mesh",
        compiled=compiled,
        listed=listed,
    )


def allocations(message: str) -> tuple[memory.Large, ...]:
    """The largest buffers that the compiler's refusal lists, the largest first; () where it lists none."""
    found = []
    for number, unit, rest in _ALLOCATION.findall(message):
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", rest)
        operation = re.search(r'op_name="([^"]*)"', rest)
        label = re.search(r"XLA label: %?([\w.\-]+)", rest)
        source = operation.group(1) if operation else label.group(1) if label else ""
        region, which = classify(source)
        size = int(float(number) * _UNITS[unit])
        found.append(memory.Large(size, shape.group(1) if shape else "", "", source, region, which))
    alone = _ALONE.search(message)
    if alone and not found:
        found.append(memory.Large(int(alone[1]), alone[2], "", alone[3], *classify(alone[3])))
    return tuple(sorted(found, key=lambda item: -item.bytes))


def _in_words(item: memory.Large) -> str:
    """
    >>> _in_words(memory.Large(2**30, "f32[8]", "gradients", "jit(step)/mul", "mlp", "backward"))
    'f32[8] 1.00 GiB (gradients, mlp backward)'
    """
    where = " ".join(word for word in (item.region, item.which) if word and word != "rest") or item.operation
    return f"{item.shape} {format_bytes(item.bytes)} ({', '.join(word for word in (item.part, where) if word)})"
