"""The jitted programs of a run: the train step with all that it is called with, and the step that decodes a token.

Everything is abstract: nothing is allocated, and the mesh may be one of devices that are not there.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, Mesh

from t5x_like.core import tree
from t5x_like.core.dtypes import INT8
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data import reference_logp
from t5x_like.inference.decode import decode_step, read_prompts
from t5x_like.layers import remat as remats
from t5x_like.layers.dropout import draws_by_row
from t5x_like.layers.stack import stretch
from t5x_like.models.model import Model
from t5x_like.objectives import table as objectives
from t5x_like.objectives.interface import Objective, Role, frozen_role, policy
from t5x_like.optim import optimizers
from t5x_like.optim import rules as path_rules
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.pipeline import AXIS, PipelineConfig, Schedule, schedule_of, stages_of
from t5x_like.parallel.sharding import abstract_batch, named
from t5x_like.peft import attach as adapters
from t5x_like.runs.roles import BASE, POLICY, FrozenModel, Opener, build_model, frozen_models, open_role
from t5x_like.runs.train import Experiment, multiples
from t5x_like.training import state as train_state
from t5x_like.training.step import StepConfig, make_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted train step of a run with all that it is called with, in the abstract: nothing is allocated."""

    mesh: Mesh  # of a program that is only lowered an AbstractMesh, which has all but devices
    model: Model
    policy: Role  # the model as it is trained, with its adapters
    roles: Mapping[str, FrozenModel]  # the models that are read beside it
    objective: Objective
    optimizer: optimizers.Optimizer
    parts: train_state.Parts
    layout: train_state.Layout
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Any  # jitted (state, frozen, batch) -> (state, metrics); the state is donated
    evaluate: Any  # jitted (params, frozen, batch) -> sums


def step_program(experiment: Experiment, mesh: Mesh | AbstractMesh, *, opened: Opener = open_role) -> Program:
    """The train and the evaluation step on a mesh, which may be one of devices that are not there. opened: what opens
    the models of config.roles."""
    mesh = cast(Mesh, mesh)
    platform = meshes.platform(mesh)
    pipeline = experiment.mesh.pipeline
    model = build_model(experiment.model, rules=experiment.mesh.rules, platform=platform, pipeline=pipeline)
    rules = model.rules
    own, trainable, frozen = _policy(experiment, model)
    _check_rules(rules, tree.join(trainable, frozen), where="config.mesh.rules")
    data = experiment.data
    held = {name: role for name, role in experiment.roles.items() if name not in experiment.cached_roles}
    longest = max(data.length, data.encoder_length)
    others = frozen_models(held, length=longest, platform=platform, pipeline=pipeline, opened=opened)
    for name, other in others.items():
        _check_rules(other.model.rules, other.part.specs, where=f"config.roles.{name}.rules")
    _check_stages(model, experiment.mesh.pipeline, mesh.shape, where="config.model")
    for name, other in others.items():
        _check_stages(other.model, experiment.mesh.pipeline, mesh.shape, where=f"config.roles.{name}")
    roles = own | {name: frozen_role(other.model, name) for name, other in others.items()}
    offered = experiment.arrays() | (reference_logp.arrays(data) if experiment.cached_roles else {})
    objective = objectives.build(experiment.objective, roles, offered)
    steps = experiment.optim.schedule.steps
    assert steps is not None, "from_config has filled it in"
    optimizer = optimizers.build(experiment.optim, specs=trainable, total_steps=steps, frozen=tree.flatten(frozen))
    base = {"base": train_state.Frozen(frozen, rules, source=None)}
    parts = train_state.Parts(trainable, rules, base | {name: other.part for name, other in others.items()})
    layout = train_state.layout(optimizer, parts, ema=experiment.loop.ema_decay is not None, mesh=mesh)
    step = make_step(
        objective, optimizer, rules=rules, param_axes=layout.axes["params"], config=_step_config(experiment)
    )
    options = experiment.runtime.compiler_options.of(platform)
    return Program(
        mesh=mesh,
        model=model,
        policy=own[POLICY],
        roles=others,
        objective=objective,
        optimizer=optimizer,
        parts=parts,
        layout=layout,
        batch=abstract_batch(mesh, rules, objective.inputs),
        step=jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings(), None), compiler_options=options),
        evaluate=jax.jit(objective.evaluate, compiler_options=options),
    )


def _policy(experiment: Experiment, model: Model) -> tuple[dict[str, Role], dict[str, Any], dict[str, Any]]:
    """(the model that is trained, by role, with and without its adapter; specs of its parameters that are trained, and
    of those that are not)."""
    adapter = adapters.build(experiment.adapter, model.specs())
    base, candidates = {}, model.specs()
    if adapter is not None:
        # Heads besides the LM head begin with the run, so that they are trained with an adapter.
        heads, base = tree.split(candidates, lambda path: path.startswith("heads/"))
        candidates = tree.join(adapter.specs(), heads)
    frozen_paths = path_rules.frozen_paths(experiment.optim, candidates)
    frozen, trainable = tree.split(candidates, lambda path: path in frozen_paths)
    if not trainable:
        raise UsageError("config.optim.freeze leaves no parameter to train; let its rules spare some")
    frozen = tree.join(base, frozen)
    if adapter is None:
        return {POLICY: policy(model)}, trainable, frozen
    return {POLICY: policy(model, adapter.attach), BASE: frozen_role(model, BASE)}, trainable, frozen


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """The model of a run as it decodes, with the abstract arguments that its programs share."""

    model: Model
    params: Any
    cache: Any
    row: jax.ShapeDtypeStruct  # one number a row
    out_shardings: tuple[Any, ...]  # of (logits, cache)
    options: Any  # of the compiler


def _decoding(experiment: Experiment, mesh: Mesh, *, rows: int, length: int) -> _Decoding:
    """UsageError where the rows do not lie on the mesh, or the model reads no texts of this length."""
    platform = meshes.platform(mesh)
    model = build_model(experiment.model, rules=experiment.mesh.rules, platform=platform)
    if length > model.config.max_length:
        raise UsageError(
            f"--length={length} is longer than the texts of this model, config.model.max_length="
            f"{model.config.max_length}; give fewer, or a larger max_length"
        )
    shards = math.prod(mesh.shape[axis] for axis in model.rules.mesh_axes("batch"))
    if rows % shards:
        raise UsageError(f"--rows={rows} is not divisible by the {shards} data shards; use {multiples(rows, shards)}")

    def abstract(specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(
                spec.shape, spec.dtype, sharding=named(mesh, model.rules, spec.axes, spec.shape)
            ),
            specs,
        )

    cache = abstract(model.cache_specs(rows, length, experiment.data.encoder_length))
    row = jax.ShapeDtypeStruct((rows,), "int32", sharding=named(mesh, model.rules, ("batch",), (rows,)))
    outputs = (None, jax.tree.map(lambda leaf: leaf.sharding, cache))
    options = experiment.runtime.compiler_options.of(platform)
    return _Decoding(model, abstract(model.specs()), cache, row, outputs, options)


def decode_program(experiment: Experiment, mesh: Mesh, *, rows: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step that adds one token to each row, and its abstract arguments. The cache is donated."""
    given = _decoding(experiment, mesh, rows=rows, length=length)
    step = jax.jit(
        functools.partial(decode_step, given.model),
        donate_argnums=1,
        out_shardings=given.out_shardings,
        compiler_options=given.options,
    )
    return step, (given.params, given.cache, given.row, given.row)


def prefill_program(experiment: Experiment, mesh: Mesh, *, rows: int, length: int) -> tuple[Any, tuple[Any, ...]]:
    """The jitted program that reads prompts into a cache of `length` tokens a row, and its abstract arguments.

    A decoder's prompts fill the cache. An encoder-decoder reads sources of config.data.encoder_length, of which the
    cache keeps the keys and values of cross-attention, and the decoder's start token (`prompt_length`).
    """
    given = _decoding(experiment, mesh, rows=rows, length=length)
    inputs = {"prompts": prompt_length(experiment, length)}
    if "encoder_inputs" in given.model.inputs:
        inputs |= dict.fromkeys(("encoder_inputs", "encoder_segment_ids"), experiment.data.encoder_length)
    batch = abstract_batch(
        mesh,
        given.model.rules,
        {n: ArraySpec((rows, size), "int32", ("batch", "length")) for n, size in inputs.items()},
    )
    step = jax.jit(
        functools.partial(read_prompts, given.model, length=length),
        out_shardings=given.out_shardings,
        compiler_options=given.options,
    )
    return step, (given.params, batch.pop("prompts"), given.row, batch)


def facts_of_texts(experiment: Experiment, program: str, *, rows: int, length: int) -> str:
    """What a "prefill" or a "decode" of these texts is, in a line."""
    source = experiment.data.encoder_length
    behind = f", behind sources of {source} tokens" if source else ""
    if program == "decode":
        return f"one more token of {rows} texts with a cache of {length} tokens each{behind}"
    read = f"{rows} sources of {source} tokens, and a start token behind each" if source else f"{rows} prompts"
    return f"{read}, into a cache of {length} tokens a text"


def prompt_length(experiment: Experiment, length: int) -> int:
    """Tokens that the decoder reads of each prompt before the first new one, where texts have `length` tokens."""
    return 1 if experiment.data.encoder_length else length


def initialize(
    program: Program, *, seed: int, taken: Mapping[str, jax.Array] | None = None
) -> tuple[train_state.State, dict[str, Any]]:
    """The first state and the frozen parameters of a run, each leaf made where it lies; `taken` were read elsewhere."""
    key = jax.random.key(seed)
    return train_state.initialize(program.parts, program.optimizer, key, program.layout, taken=taken or {})


def flops_per_token(program: Program, length: int, source_length: int) -> float:
    """Of training, for each token of a row of `length`: what is only read goes forward alone."""
    others = sum(role.model.flops_per_token(length, source_length).forward for role in program.roles.values())
    return program.model.flops_per_token(length, source_length).train + others


def check_mesh(experiment: Experiment, sizes: Mapping[str, int]) -> None:
    """The batch must divide over the data shards, micro-batch by micro-batch."""
    rules = sharding_rules.rules(experiment.mesh.rules)
    axes = [axis for axis in rules.mesh_axes("batch") if sizes[axis] > 1]
    shards = math.prod(sizes[axis] for axis in axes)
    parts = shards * experiment.loop.micro_batches
    if experiment.data.batch_size % parts:
        composed = " x ".join(f"{axis}={sizes[axis]}" for axis in axes) or "1"
        micro = f" x {experiment.loop.micro_batches} micro-batches" if experiment.loop.micro_batches > 1 else ""
        raise UsageError(
            f"config.data.batch_size={experiment.data.batch_size} is not divisible by the {shards} data shards "
            f"({composed}){micro}; use {multiples(experiment.data.batch_size, parts)}"
        )
    _check_pipeline(experiment, rules, sizes)
    lengths = math.prod(sizes[axis] for axis in rules.mesh_axes("length"))
    for field in ("length", "encoder_length"):
        tokens = getattr(experiment.data, field)
        if tokens % lengths:
            raise UsageError(
                f"config.data.{field}={tokens} is not divisible by the {lengths} shards of a row; "
                f"use {multiples(tokens, lengths)}"
            )


def schedule(experiment: Experiment, sizes: Mapping[str, int]) -> Schedule | None:
    """What the stages of a mesh do in which turn; None without stages."""
    stages = stages_of(sharding_rules.rules(experiment.mesh.rules), sizes)
    return None if stages == 1 else schedule_of(experiment.mesh.pipeline, stages)


def _check_pipeline(experiment: Experiment, rules: sharding_rules.Rules, sizes: Mapping[str, int]) -> None:
    """Rows must divide over micro-batches of the pipeline, and over the data shards in each."""
    found, lora = schedule(experiment, sizes), experiment.adapter.lora
    if found is None:
        return
    rows = experiment.data.batch_size // experiment.loop.micro_batches
    shards = math.prod(sizes[axis] for axis in rules.without(AXIS).mesh_axes("batch"))
    if rows % (shards * found.micro_batches):
        composed = f"{found.micro_batches} micro-batches of the pipeline x {shards} data shards"
        parts = shards * found.micro_batches * experiment.loop.micro_batches
        raise UsageError(
            f"config.data.batch_size={experiment.data.batch_size} is not divisible by {composed} x "
            f"config.loop.micro_batches={experiment.loop.micro_batches}; change config.mesh.pipeline.micro_batches, or "
            f"use {multiples(experiment.data.batch_size, parts)}"
        )
    if lora is not None and lora.dropout > 0:
        raise UsageError(
            f"config.adapter.lora.dropout={lora.dropout:g} would draw the same mask for all micro-batches of "
            f"config.mesh.stage={found.stages}; set it to 0, or use no stages"
        )
    if experiment.model.dropout > 0 and not draws_by_row():
        raise UsageError(
            f"config.model.dropout={experiment.model.dropout:g} in stages draws each row by its number, which jax does "
            f"by threefry2x32 alone, and here jax_default_prng_impl={jax.config.jax_default_prng_impl}; leave "  # pyright: ignore[reportAttributeAccessIssue]
            "JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE as jax has them, or set dropout to 0"
        )
    if experiment.model.dtype.products == INT8:
        raise UsageError(
            "config.model.dtype.products=int8 would round all micro-batches of "
            f"config.mesh.stage={found.stages} by the same numbers; use int8_forward, or no stages"
        )
    shares = remats.parse(experiment.model.remat)
    if len(shares) > 1 or any(remats.HOST in share.policy for share in shares):
        raise UsageError(
            f"config.model.remat={experiment.model.remat!r}: with config.mesh.stage={found.stages} all layers save the "
            "same on their device; name one policy, or points, without shares and without the host"
        )


def _check_stages(model: Model, pipeline: PipelineConfig, sizes: Mapping[str, int], *, where: str) -> None:
    """The layers of a model must divide over the stages of the mesh."""
    stages = stages_of(model.rules, sizes)
    if stages == 1:
        return
    for name, stack in model.config.stacks.items():
        try:
            stretch(stack.kinds, schedule_of(pipeline, stages))
        except UsageError as error:
            raise UsageError(f"{where}: {name}: {error}") from None


def _step_config(experiment: Experiment) -> StepConfig:
    loop, lora = experiment.loop, experiment.adapter.lora
    return StepConfig(
        micro_batches=loop.micro_batches,
        clip_norm=experiment.optim.clip_norm,
        ema_decay=loop.ema_decay,
        spike_deviations=None if loop.on_spike == "off" else loop.spike_deviations,
        spike_memory=loop.spike_memory,
        spike_warmup=loop.spike_warmup,
        dropout=experiment.model.dropout > 0
        or (lora is not None and lora.dropout > 0)
        or experiment.model.dtype.products == INT8,
        seed=experiment.seed,
    )


def _check_rules(rules: sharding_rules.Rules, specs: Any, *, where: str) -> None:
    activations = {name for name in sharding_rules.TABLE if name in ("batch", "length", "kv_length")}
    activations |= {name for name in sharding_rules.TABLE if name.startswith("act_")}
    used = {axis for _, spec in tree.leaves(specs) for axis in spec.axes}
    for name in sharding_rules.unused(rules, used | activations):
        raise UsageError(f"{where} changes {name!r}, which no parameter of this model has; remove it")
