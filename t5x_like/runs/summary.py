"""The start-up screen: what will run, in facts a person checks before leaving it alone. Computes nothing else."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh

from t5x_like.core import tree
from t5x_like.core.terminal import format_bytes, format_count, format_duration
from t5x_like.models.attention_paths import Path, attention_paths
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.pipeline import AXIS
from t5x_like.peft.attach import is_adapter
from t5x_like.runs.program import Program, schedule
from t5x_like.runs.train import Experiment
from t5x_like.storage import paths
from t5x_like.training.goodput import Account


@dataclasses.dataclass(frozen=True)
class Told:
    """What a start knows besides config and program.

    origin: where the parameters come from. start: updates done. data: what TrainData.describe says of all steps.
    """

    workdir: str
    _: dataclasses.KW_ONLY
    origin: str
    start: int
    data: Mapping[str, Any]
    notes: Sequence[str]


def sections(experiment: Experiment, program: Program, told: Told, *, memory: Any) -> dict[str, dict[str, object]]:
    """{title: {name: value}}; `memory` is the compiler's analysis of the train step."""
    loop, taken = experiment.loop, attention(experiment, program)
    notes = [*told.notes, *slow_paths(taken, program.mesh.devices.flat[0].platform)]
    shown = {
        "run": {
            "workdir": told.workdir,
            "begins with": told.origin,
            "steps": f"{told.start} to {loop.steps}, {format_count(told.data['tokens_per_step'])} tokens each"
            + (f" in {loop.micro_batches} micro-batches" if loop.micro_batches > 1 else ""),
            "objective": experiment.objective.name,
        },
        "model": _model(experiment, program),
        "data": _data(told.data),
        "mesh": _mesh(experiment, program),
        "attention": {path.where: f"{path.name}: {path.why}" for path in taken},
        "memory": _memory(program, memory),
        "optimizer": {
            "name": experiment.optim.name,
            "learning rate": f"{experiment.optim.learning_rate:g}, {experiment.optim.schedule.name} over "
            f"{experiment.optim.schedule.steps} steps after {experiment.optim.schedule.warmup_steps} of warm-up",
        },
    }
    if notes:
        shown["notes"] = {str(index): note for index, note in enumerate(notes, 1)}
    return shown


def attention(experiment: Experiment, program: Program) -> list[Path]:
    """The attention paths of one micro-batch of the train step, or of a pipeline in it."""
    found = schedule(experiment, program.mesh.shape)
    parts = experiment.loop.micro_batches * (found.micro_batches if found else 1)
    model = program.model
    if found:  # rows of a stage do not lie on the axis of the stages
        model = dataclasses.replace(model, rules=model.rules.without(AXIS))
    batch = {
        name: jax.ShapeDtypeStruct((array.shape[0] // parts, *array.shape[1:]), array.dtype)
        for name, array in program.batch.items()
    }
    absent = isinstance(program.mesh, AbstractMesh)
    capability = None if absent else getattr(program.mesh.devices.flat[0], "compute_capability", None)
    return attention_paths(
        model,
        batch,
        platform=meshes.platform(program.mesh),
        compute_capability=None if capability is None else float(capability),
    )


def slow_paths(taken: Iterable[Path], platform: str) -> Iterator[str]:
    """A line for each stack that cannot use the flash attention kernel of its accelerator."""
    for path in taken:
        if platform == "cpu" or path.name not in ("materialised", "blockwise"):
            continue
        rows, heads, length, keys = path.shape
        cost = (
            f"every layer holds logits of {rows} x {heads} x {length} x {keys} in float32, "
            f"{format_bytes(4 * math.prod(path.shape))} over all devices"
            if path.name == "materialised"
            else "a step takes longer than with the kernel"
        )
        yield f"attention of the {path.where} runs without a flash attention kernel ({path.why}): {cost}"


def closing(workdir: str, evaluation: Mapping[str, float], *, spent: Account, plot: bool) -> Iterator[str]:
    """What a finished run says at the end."""
    yield f"done: {workdir}"
    for name, value in evaluation.items():
        if name.endswith("/bits_per_byte"):
            held_out = name.removeprefix("eval/").removesuffix("/bits_per_byte")
            yield f"  {held_out} bits per byte: {value:.4f}"
    if spent.rows:
        starts = f" over {len(spent.rows)} starts, {spent.lost_steps} steps lost" if len(spent.rows) > 1 else ""
        yield f"  goodput: {spent.goodput:.1%} of {format_duration(spent.wall)}{starts}"
    if plot:
        yield f"  curves: {paths.join(workdir, 'loss.png')}"
    yield f"  try: t5x_like generate {workdir} --prompt=..."


def _model(experiment: Experiment, program: Program) -> dict[str, object]:
    c = experiment.model
    frozen = sum(leaf.size for _, leaf in tree.leaves(program.layout.frozen["base"]))
    adapter = sum(leaf.size for path, leaf in tree.leaves(program.layout.state["params"]) if is_adapter(path))
    untrained = "all frozen" if adapter else f"of which {format_count(frozen)} are frozen"
    others = {
        name: f"{role.model.config.family} {role.model.config.size}, "
        f"{format_count(role.model.parameter_count())} frozen parameters of {role.stored.directory}"
        for name, role in program.roles.items()
    }
    stacks = {
        name: f"{s.layers} layers, {s.heads} heads of {s.head_size}, {s.kv_heads} kv heads, mlp {s.mlp}"
        for name, s in c.stacks.items()
    }
    return {
        "family": f"{c.family} {c.size}",
        "parameters": format_count(program.model.parameter_count()) + (f", {untrained}" if frozen else ""),
        **({"adapter": f"{experiment.adapter.name}, {format_count(adapter)} trained parameters"} if adapter else {}),
        **stacks,
        "sizes": f"width {c.width}, vocabulary {c.vocab_size} (stored {c.padded_vocab})",
        "numbers": f"{program.model.dtypes.told}, remat {c.remat}",
        **others,
    }


def _data(data: Mapping[str, Any]) -> dict[str, object]:
    rows: dict[str, object] = {}
    for name, facts in data["components"].items():
        rows[name] = (
            f"{facts['source']}: {format_count(facts['tokens'])} tokens of {format_count(facts['documents'])} "
            f"documents, {facts['share_of_rows']:.1%} of rows, {facts['epochs']:.2f} epochs in all steps"
            + (f", {facts['bad']} bad records left out" if facts["bad"] else "")
            + (f", {facts['empty_files']} empty files" if facts["empty_files"] else "")
        )
        if facts["cut"]:
            rows[f"note on {name}"] = f"{facts['cut']} (config.data.truncate)"
    for name, facts in data["validation"].items():
        rows[f"held out: {name}"] = f"{facts['source']}: {format_count(facts['tokens'])} tokens" + (
            f"; {facts['cut']}" if facts["cut"] else ""
        )
    for name, source in data["unevaluated"].items():
        rows[f"held out: {name}"] = f"{source}: nothing (config.data.validation is too small a share), not evaluated"
    rows |= data.get("more", {})
    tokens = format_count(data["tokens_to_come"])
    tokenizer = data["tokenizer"]
    lossless = f"not lossless ({tokenizer['loses']})" if tokenizer["loses"] else "lossless"
    rows["tokens"] = f"{tokens} in all steps, vocabulary of {tokenizer['size']} ({tokenizer['kind']}, {lossless})"
    rows["fingerprint"] = data["fingerprint"][:16]
    return rows


def _mesh(experiment: Experiment, program: Program) -> dict[str, object]:
    sizes = {name: size for name, size in program.mesh.shape.items() if size > 1}
    first = program.mesh.devices.flat[0]
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rules = program.model.rules
    in_force = {name: axes for name, axes in rules.table if any(axis in sizes for axis in axes)}
    rows: dict[str, object] = {
        "devices": f"{program.mesh.size} x {first.device_kind}{processes}",
        "axes": " x ".join(f"{name}={size}" for name, size in sizes.items()) or "one device",
    }
    if in_force:
        rows["rules"] = ", ".join(
            f"{name}={'+'.join(axis for axis in axes if axis in sizes)}" for name, axes in in_force.items()
        )
    stages = schedule(experiment, program.mesh.shape)
    if stages is not None:
        rows["pipeline"] = stages.described
    for name, stack in program.model.config.stacks.items():
        if rules.replicated_heads(stack.kv_heads, program.mesh.shape):
            rows[f"note on the {name}"] = f"{stack.kv_heads} kv heads do not divide over the tensor shards: replicated"
    return rows


def _memory(program: Program, memory: Any) -> dict[str, object]:
    """Bytes on one device."""
    state = program.layout.state
    parts = {
        "parameters": [*jax.tree.leaves(state["params"]), *jax.tree.leaves(program.layout.frozen)],
        "optimizer": jax.tree.leaves(state["optimizer"]),
        "average": jax.tree.leaves(state.get("ema", {})),
    }
    sizes = {name: _bytes_a_device(leaves) for name, leaves in parts.items()}
    rows: dict[str, object] = {name: format_bytes(size) for name, size in sizes.items() if size}
    if memory is not None:
        rows["activations"] = f"{format_bytes(memory.temp_size_in_bytes)} (the compiler's temporaries of a step)"
    return {"a device": ", ".join(f"{name} {value}" for name, value in rows.items())}


def _bytes_a_device(leaves: Iterable[Any]) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
