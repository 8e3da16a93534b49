"""What is remarkable about a run before anything is compiled: one finding each, with what to do about it.

Asked are a built program and the shapes that it was traced with, on devices that are there or not. What is wrong, so
that the run could not start, is found by building it (doctor.py).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from t5x_like.core import tree
from t5x_like.core.terminal import format_bytes
from t5x_like.layers import remat as remats
from t5x_like.layers.attention import kernels
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.pipeline import NEUTRAL
from t5x_like.parallel.sharding import device_bytes, spec_names
from t5x_like.runs import summary
from t5x_like.runs.program import Program, schedule
from t5x_like.runs.train import Experiment

LEVELS = ("error", "warning", "note")
# Parameters may take this much more of a device than were all of them divided over all axes that divide parameters.
REPLICATED_SHARE, REPLICATED_BYTES = 0.02, 16 * 2**20
# Tokens of a micro-batch on a device below which the matrix units of an accelerator wait for weights.
FEW_TOKENS = 1024
# Rows and columns of a TPU's matrix unit, and queries of attention in a block that keep it busy.
TILE, BLOCK = 128, 512
# Of a machine's memory for the copy of the state that a checkpoint holds, beside data and the runtime.
HOST_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Finding:
    """level: in LEVELS. path: of the config, or what it is about. remedy: what to do, "" for a fact."""

    level: str
    path: str
    what: str
    remedy: str = ""

    @property
    def line(self) -> str:
        return f"{self.path}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is looked at for. host_bytes: memory of a machine, 0 for unknown; hosts: how many there are."""

    hosts: int = 1
    host_bytes: int = 0


def of_error(error: Exception) -> Finding:
    """An error that a user is meant to read, by its parts: `config.a.b=3 is wrong; do that`.

    >>> of_error(ValueError("config.a.b=3 is wrong; take 4"))
    Finding(level='error', path='config.a.b', what='config.a.b=3 is wrong', remedy='take 4')
    """
    what, _, remedy = str(error).partition("; ")
    path = re.match(r"config(\.\w+)*", what)
    return Finding("error", path[0] if path else "config", what, remedy)


def look(experiment: Experiment, program: Program, names: set[str], place: Place) -> list[Finding]:
    """All findings, the worst first. names: of activations in the traced step (`activation_names`).

    To be called with the mesh of the program in context.
    """
    found = [
        *_attention(experiment, program),
        *_remat(experiment, names),
        *_replicated(program),
        *_rules(experiment, program),
        *_pipeline(experiment, program),
        *_batch(experiment, program),
        *_matrices(experiment, program),
        *_lengths(experiment, program),
        *_vocabulary(experiment, program),
        *_compiler(experiment),
        *_dtypes(experiment, program),
        *_host(experiment, program, place),
        *_schedule(experiment),
        *_filled_in(experiment),
    ]
    return sorted(found, key=lambda each: LEVELS.index(each.level))


def activation_names(jaxpr: Any) -> set[str]:
    """The names that a traced program gives to activations (`checkpoint_name`), those of inner programs included."""
    found = set()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "name":
            found.add(equation.params["name"])
        for inner in _programs(equation.params.values()):
            found |= activation_names(inner)
    return found


def _programs(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, list | tuple):
            yield from _programs(value)


def _sizes(program: Program) -> dict[str, int]:
    """Mesh axes with more than one device."""
    return {axis: size for axis, size in program.mesh.shape.items() if size > 1}


def _shards(program: Program, axis: str) -> int:
    sizes = _sizes(program)
    return math.prod(sizes.get(name, 1) for name in program.model.rules.mesh_axes(axis))


def _attention(experiment: Experiment, program: Program) -> Iterator[Finding]:
    platform = meshes.platform(program.mesh)
    taken = summary.attention(experiment, program)
    slow = list(summary.slow_paths(taken, platform))
    for line in slow:
        yield Finding("warning", "attention", line, "change what it names, or the lengths of config.data")
    for path in taken:
        yield Finding("note", "attention", f"{path.where}: {path.name}, {path.why}")


def _remat(experiment: Experiment, names: set[str]) -> Iterator[Finding]:
    policy = experiment.model.remat
    wanted = [name for share in remats.parse(policy) for name in _points(share)]
    missing = [name for name in wanted if name not in names]
    if wanted and len(missing) == len(wanted):
        remedy = f"use one of {', '.join(other for other in remats.POLICIES if other != policy)}"
        what = f"{policy!r} saves {', '.join(wanted)}, and no activation of this program has such a name"
        yield Finding("warning", "config.model.remat", what, remedy)
    elif missing:
        what = f"{policy!r} saves {', '.join(missing)} too, which no activation of this program is called"
        yield Finding("note", "config.model.remat", what)
    for name, stack_config in experiment.model.stacks.items():
        kinds = stack_config.kinds
        used = {"full", *remats.by_layer(policy, kinds)}
        for share in remats.parse(policy):
            if share.policy not in used:
                what = f"{share.policy}:{share.layers:g} is of none of the {len(kinds)} layers of the {name}"
                remedy = "shares are of whole periods of the pattern of layers: use a larger share, or no share"
                yield Finding("warning", "config.model.remat", what, remedy)


def _points(share: remats.Share) -> tuple[str, ...]:
    """The names of activations that a policy saves, which those without names save by other rules."""
    if share.policy in remats.POLICIES:
        return remats.SAVED.get(share.policy, ())
    return tuple(point.removesuffix(remats.HOST) for point in share.points)


def _replicated(program: Program) -> Iterator[Finding]:
    sizes, rules = _sizes(program), program.model.rules
    leaves = tree.flatten(program.layout.state["params"]) | tree.flatten(program.layout.frozen.get("base", {}))
    axes = tree.flatten(program.layout.axes["params"]) | tree.flatten(program.layout.frozen_axes.get("base", {}))
    held = {path: device_bytes(leaf) for path, leaf in leaves.items()}
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    named = {axis for each in axes.values() for axis in each if axis is not None}
    meant = {name for axis in named for name in (*rules.mesh_axes(axis), *sharding_rules.TABLE[axis])}
    dividing = [name for name in sizes if name in meant]  # by the rules in force, or by the table that they change
    for field, stack_config in program.model.config.stacks.items():
        if rules.replicated_heads(stack_config.kv_heads, program.mesh.shape):
            what = f"{stack_config.kv_heads} kv heads do not divide over the {_shards(program, 'kv_heads')} shards"
            yield Finding("note", f"config.model.{field}.kv_heads", f"{what}: keys and values are replicated")
    excess = sum(held.values()) - total / math.prod(sizes[name] for name in dividing)
    if excess > max(REPLICATED_SHARE * sum(held.values()), REPLICATED_BYTES):
        missing = {path: _missing(leaf, dividing) for path, leaf in leaves.items()}
        worst = sorted((path for path in leaves if missing[path]), key=lambda path: -held[path])[:3]
        listed = ", ".join(f"{path} ({format_bytes(held[path])} over {' x '.join(missing[path])})" for path in worst)
        what = f"{format_bytes(excess)} a device more than if all parameters were divided alike: {listed}"
        yield Finding("warning", "config.mesh.rules", what, "place a dim of them on these axes, or use smaller ones")
    others = [name for name in sizes if name not in dividing and name in rules.mesh_axes("batch")]
    if others:
        state = device_bytes((program.layout.state, program.layout.frozen))
        over = " x ".join(f"{name}={sizes[name]}" for name in others)
        yield Finding(
            "note", "config.mesh", f"the whole state, {format_bytes(state)} a device, is replicated over {over}"
        )


def _missing(leaf: Any, dividing: list[str]) -> list[str]:
    used = {name for entry in leaf.sharding.spec for name in spec_names(entry)}
    return [name for name in dividing if name not in used]


def _rules(experiment: Experiment, program: Program) -> Iterator[Finding]:
    sizes = _sizes(program)
    for entry in filter(None, (part.strip() for part in experiment.mesh.rules.split(","))):
        axis = entry.partition("=")[0].strip()
        concerned = {*program.model.rules.mesh_axes(axis), *sharding_rules.TABLE[axis]}
        if not concerned & sizes.keys():
            what = f"{entry!r} changes nothing on this mesh, whose axes of more than one device are "
            # On one device a config for many is not wrong.
            level, remedy = ("warning", "remove it") if sizes else ("note", "")
            yield Finding(level, "config.mesh.rules", what + (", ".join(sizes) or "none"), remedy)


def _pipeline(experiment: Experiment, program: Program) -> Iterator[Finding]:
    sizes, given = _sizes(program), experiment.mesh.pipeline
    changed = [name for name, value in dataclasses.asdict(given).items() if value != getattr(NEUTRAL, name)]
    if changed and schedule(experiment, program.mesh.shape) is None:
        said = ", ".join(f"{name}={getattr(given, name)}" for name in changed)
        # On one device a config for many is not wrong.
        level, remedy = ("warning", "set config.mesh.stage, or remove it") if sizes else ("note", "")
        yield Finding(level, "config.mesh.pipeline", f"{said} changes nothing on a mesh without stages", remedy)


def _batch(experiment: Experiment, program: Program) -> Iterator[Finding]:
    parts, data = experiment.loop.micro_batches, experiment.data
    shards, length = _shards(program, "batch"), _shards(program, "length")
    rows = data.batch_size // shards // parts
    tokens = rows * (data.length + data.encoder_length) // length
    what = f"{rows} rows of a micro-batch on a device, {tokens:,} tokens"
    if parts > 1:
        what += f"; {parts} micro-batches, for each of which FSDP gathers the weights again"
    accelerator = meshes.platform(program.mesh) != "cpu"
    if accelerator and tokens < FEW_TOKENS:
        remedy = (
            "use fewer micro-batches, a larger batch or fewer chips"
            if parts > 1
            else "use a larger batch or fewer chips"
        )
        yield Finding("warning", "config.data.batch_size", what, remedy)
    else:
        yield Finding("note", "config.data.batch_size", what)


def _matrices(experiment: Experiment, program: Program) -> Iterator[Finding]:
    """Dims of one device that leave a TPU's matrix unit half empty."""
    if meshes.platform(program.mesh) != "tpu":
        return
    for name, stack_config in experiment.model.stacks.items():
        sizes = {
            "width": experiment.model.width,
            f"{name}.mlp": stack_config.mlp // _shards(program, "act_mlp"),
            f"{name}.heads": stack_config.heads * stack_config.head_size // _shards(program, "act_heads"),
            f"{name}.head_size": stack_config.head_size,
        }
        for field, size in sizes.items():
            if size % TILE:
                what = f"{size} columns on a device fill {size / (-(-size // TILE) * TILE):.0%} of tiles of {TILE}"
                level = "warning" if size < TILE and not field.endswith("head_size") else "note"
                yield Finding(level, f"config.model.{field}", what, f"use a multiple of {TILE} a device")


def _lengths(experiment: Experiment, program: Program) -> Iterator[Finding]:
    if meshes.platform(program.mesh) != "tpu":
        return
    for field in ("length", "encoder_length"):
        length = getattr(experiment.data, field) // _shards(program, "length")
        if length < kernels.LANES or length % kernels.LANES:
            continue  # then another path runs, which is told
        asked = experiment.model.attention_block
        block = kernels.block_sizes(length, asked).block_q
        what = f"{length} tokens of a row on a device are attended to in blocks of {block}"
        if block < min(BLOCK, asked, length):
            yield Finding("warning", f"config.data.{field}", what, f"use a multiple of {min(BLOCK, asked)} a device")
        elif block < min(asked, length):
            yield Finding("note", "config.model.attention_block", f"{what}: {asked} does not divide them")
        elif block < BLOCK:
            remedy = f"blocks below {BLOCK} take longer by the planner's estimate"
            yield Finding("note", "config.model.attention_block", what, remedy)


def _vocabulary(experiment: Experiment, program: Program) -> Iterator[Finding]:
    config = experiment.model
    padding = config.padded_vocab - config.vocab_size
    if padding > 0.02 * config.vocab_size:
        what = f"{padding} of {config.padded_vocab} stored rows are padding"
        yield Finding("note", "config.model.vocab_multiple", what)
    columns = config.padded_vocab // _shards(program, "vocab")
    if meshes.platform(program.mesh) == "tpu" and columns % TILE:
        what = f"a device has {columns} columns of the vocabulary, no multiple of {TILE}"
        remedy = f"set it to {TILE * _shards(program, 'vocab')}"
        yield Finding("warning", "config.model.vocab_multiple", what, remedy)


def _compiler(experiment: Experiment) -> Iterator[Finding]:
    options = experiment.runtime.compiler_options
    for platform in ("cpu", "gpu", "tpu"):
        for name in options.of(platform) or {}:
            owner = re.match(r"xla_(cpu|gpu|tpu)_", name)
            if owner and owner[1] != platform:
                # Every compiler takes the options of all platforms but xla_tpu_*, which those for CPU and GPU refuse.
                level, end = ("error", "refuses") if owner[1] == "tpu" else ("warning", "takes without effect")
                path = f"config.runtime.compiler_options.{platform}"
                what = f"{name} is an option of the compiler for {owner[1]}, which that for {platform} {end}"
                yield Finding(level, path, what, f"move it to config.runtime.compiler_options.{owner[1]}")


def _dtypes(experiment: Experiment, program: Program) -> Iterator[Finding]:
    if meshes.platform(program.mesh) != "cpu" and program.model.dtypes.compute == "float32":
        what = "matrix products are of float32 numbers, several times slower than bfloat16 on accelerators"
        yield Finding("warning", "config.model.dtype.compute", what, "set it to auto or bfloat16")
    if program.model.dtypes.params == "bfloat16" and experiment.adapter.name == "none":
        what = "weights are trained in bfloat16: updates below a 256th of a weight are lost"
        yield Finding("warning", "config.model.dtype.params", what, "set it to float32")


def _host(experiment: Experiment, program: Program, place: Place) -> Iterator[Finding]:
    """The host's copy of the state while a checkpoint is written, and batches that are read ahead. A run that waits for
    its checkpoints (config.checkpoint.asynchronous=False) copies the state all the same."""
    devices = math.prod(program.mesh.shape.values()) // place.hosts
    state = sum(_written(leaf, devices) for leaf in jax.tree.leaves(program.layout.state))
    batch = device_bytes(program.batch) * devices * (experiment.data.prefetch + 1)
    of = f" of {format_bytes(place.host_bytes)}" if place.host_bytes else ""
    what = f"a checkpoint and {experiment.data.prefetch} batches ahead take {format_bytes(state + batch)}{of} on a host"
    if place.host_bytes and state + batch > HOST_SHARE * place.host_bytes:
        yield Finding("warning", "config.checkpoint", what, "use more chips")
    elif place.host_bytes:
        yield Finding("note", "config.checkpoint", what)


def _written(leaf: Any, devices: int) -> int:
    """Bytes of an array that a host with so many devices copies for a checkpoint: of replicas one is written."""
    held = device_bytes(leaf)
    parts = math.ceil(math.prod(leaf.shape) * leaf.dtype.itemsize / held) if held else 0
    return held * min(devices, parts)


def _schedule(experiment: Experiment) -> Iterator[Finding]:
    steps, schedule = experiment.loop.steps, experiment.optim.schedule
    if schedule.warmup_steps >= steps:
        what = f"{schedule.warmup_steps} steps of warm-up, and the run ends after {steps}"
        yield Finding("warning", "config.optim.schedule.warmup_steps", what, "use fewer, or more config.loop.steps")
    if experiment.checkpoint.every_steps > steps:
        what = f"one checkpoint in {experiment.checkpoint.every_steps} steps, and the run ends after {steps}"
        yield Finding("note", "config.checkpoint.every_steps", f"{what}: a run that is killed begins anew")


def _filled_in(experiment: Experiment) -> Iterator[Finding]:
    found = [path for path, text in _texts(dataclasses.asdict(experiment), "config") if "REPLACE/" in text]
    if found:
        yield Finding("note", found[0], f"{', '.join(found)} hold REPLACE/", "give paths of yours when it runs")


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _texts(each, f"{path}.{name}")
