"""The config of a run of reinforcement learning, and its programs beside the train step: rollouts and scoring."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_like.core import tree
from t5x_like.core.config import named
from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.read.rollouts import branched_arrays
from t5x_like.data.read.source_target import start_id
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.inference import weights
from t5x_like.inference.sampling import GREEDY, Sampling
from t5x_like.objectives import reward
from t5x_like.objectives.grpo import GrpoConfig
from t5x_like.objectives.interface import Role, frozen_role
from t5x_like.objectives.reward import HEAD
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.sharding import abstract_batch, replicated
from t5x_like.rl.config import RlConfig
from t5x_like.rl.rollout import Rollout, Shape, rollout_program, together
from t5x_like.rl.rows import text_widths
from t5x_like.rl.scoring import TOKENS, scoring_function
from t5x_like.runs.program import Program
from t5x_like.runs.roles import REFERENCE, REWARD
from t5x_like.runs.train import Experiment, multiples
from t5x_like.training.state import Layout


@dataclasses.dataclass(frozen=True)
class RlExperiment(Experiment):
    """A training run whose batches are made of answers of its own policy."""

    rl: RlConfig

    @property
    def wanted_roles(self) -> tuple[str, ...]:
        return (*super().wanted_roles, *((REWARD,) if self.rl.reward_model else ()))

    @property
    def rows(self) -> int:
        """Of an update."""
        return self.data.batch_size // self.rl.answers_per_row

    def arrays(self) -> dict[str, ArraySpec]:
        answers, tokens = self.rl.answers_per_row, self.rl.new_tokens
        if answers == 1:
            return super().arrays()
        return branched_arrays(rows=self.rows, room=prompt_room(self), answers=answers, tokens=tokens)

    def check(self, path: str) -> None:
        super().check(path)
        rl, data = self.rl, self.data
        if rl.answers_per_row > 1:
            self._check_shared_prompts()
        if self.objective.name != "grpo":
            raise UsageError(f"config.objective.name={self.objective.name!r}: `t5x_like rl` minimises 'grpo'")
        if rl.answers % data.batch_size:
            raise UsageError(
                f"config.data.batch_size={data.batch_size} does not divide the answers of an iteration, config.rl."
                f"prompts x samples = {rl.answers}; use {rl.answers}, or a part of it"
            )
        if data.encoder_length and rl.new_tokens != data.length:
            raise UsageError(
                f"config.rl.new_tokens={rl.new_tokens}, but rows of answers have config.data.length={data.length} "
                "tokens; set both to the most that an answer may have"
            )
        if rl.new_tokens > data.length:
            raise UsageError(
                f"config.rl.new_tokens={rl.new_tokens} is longer than a row, config.data.length={data.length}, which "
                f"holds prompt and answer; set config.data.length to the longest prompt + {rl.new_tokens} - 1"
            )
        if (rl.generate is None) == (not data.source):
            raise UsageError(
                "config.data.source or config.rl.generate: give prompts by one of them, a source or a function"
            )
        if rl.generate is not None and data.validation:
            raise UsageError("config.data.validation has no effect beside config.rl.generate; set config.rl.held_out")
        if self.loop.on_spike != "off":
            raise UsageError(
                f"config.loop.on_spike={self.loop.on_spike!r}: the loss of grpo is near 0 by construction, and says "
                "nothing of spikes; leave it 'off'"
            )
        self._check_dropout()

    def _check_shared_prompts(self) -> None:
        count, parts = self.rl.answers_per_row, self.rl.answers_per_row * self.loop.micro_batches
        if self.data.encoder_length:
            raise UsageError(
                f"config.rl.answers_per_row={count}: rows of a model with an encoder hold the answer alone; leave it 1"
            )
        if self.data.batch_size % parts:
            raise UsageError(
                f"config.data.batch_size={self.data.batch_size} answers make no whole rows of config.rl."
                f"answers_per_row={count} in each of config.loop.micro_batches={self.loop.micro_batches}; use "
                f"{multiples(self.data.batch_size, parts)}"
            )

    def _check_dropout(self) -> None:
        lora = self.adapter.lora
        for field, dropout in (("model", self.model.dropout), ("adapter.lora", lora.dropout if lora else 0.0)):
            if dropout:
                raise UsageError(f"config.{field}.dropout={dropout:g}: ratios need a policy without dropout; set 0")


@dataclasses.dataclass(frozen=True)
class RlPrograms:
    """Jitted, not compiled. reference: None without one; scored: the batch of `score` and `reference`."""

    sample: Rollout
    answer: Rollout
    score: Any
    reference: Any
    reward: Any
    scored: dict[str, jax.ShapeDtypeStruct]
    judged: dict[str, jax.ShapeDtypeStruct]  # the batch of `reward`


def rl_programs(
    experiment: RlExperiment, program: Program, *, end_ids: tuple[int, ...], source_end: bool = True
) -> RlPrograms:
    """source_end: whether the tokenizer has an EOS, with which sources end."""
    rl, mesh, rules = experiment.rl, program.mesh, program.model.rules
    config: GrpoConfig = named(experiment.objective)
    options = experiment.runtime.compiler_options.of(meshes.platform(mesh))
    role = program.policy
    answering = _gathered(program) if rl.weights == "gathered" else role

    def rollout(rows: int, samples: int, sampling: Sampling) -> Rollout:
        length = 1 if experiment.data.encoder_length else prompt_room(experiment)
        shape = Shape(rows, samples, length, experiment.data.encoder_length, rl.new_tokens)
        # With the compiler's default options, as inference/decode.py says.
        return rollout_program(
            answering, mesh, shape, sampling=sampling, end_ids=end_ids, seed=experiment.seed, options=None
        )

    def scoring(which: Any) -> Any:
        inputs = program.objective.inputs
        function = scoring_function(
            which, config, rules=rules, inputs=inputs, micro_batches=experiment.loop.micro_batches
        )
        return jax.jit(function, out_shardings=replicated(mesh), compiler_options=options)

    reference = _reference(config.reference, program)
    rows, widths = rl.rows or rl.answers, _text_widths(experiment, program, ended=source_end)
    samples = together(rows, rl.samples, math.prod(mesh.shape[axis] for axis in rules.mesh_axes("batch")))
    return RlPrograms(
        sample=rollout(rows, samples, Sampling(temperature=config.temperature, top_k=0, top_p=1.0)),
        answer=rollout(rows, 1, GREEDY),
        score=scoring(role),
        reference=None if reference is None else scoring(reference),
        reward=_reward_program(program, options, longest=max(widths.values())) if rl.reward_model else None,
        scored={name: program.batch[name] for name in TOKENS if name in program.batch},
        judged=abstract_batch(mesh, rules, _text_specs(experiment, widths)),
    )


def _gathered(program: Program) -> Role:
    """The policy as it answers: FSDP gathers it here, ahead of the loop over tokens, and not in every turn of it."""
    model, parts = program.model, program.parts
    rules = sharding_rules.gathered(model.rules)

    def placed(params: Any, specs: Any) -> Any:
        return weights.placed(params, specs, rules=rules, dtype=model.dtypes.compute)

    def whole(params: Any, frozen: Mapping[str, Any]) -> Any:
        base = placed(frozen["base"], parts.frozen["base"].specs)
        return program.policy.whole(placed(params, parts.trained), {**frozen, "base": base})

    return Role(dataclasses.replace(model, rules=rules), whole)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program of an iteration with its abstract arguments. times: executions in an iteration; reads: what it reads
    of the state and the frozen parameters of the run, all of which a device holds meanwhile; options: of the compiler,
    with which `step` is jitted."""

    name: str
    does: str
    times: int
    step: Any
    arguments: tuple[Any, ...]
    reads: Any
    options: Mapping[str, Any]


def stages(experiment: RlExperiment, program: Program) -> tuple[Stage, ...]:
    """All programs of an iteration in the order in which they run, for who compiles them without a tokenizer: which
    numbers the end tokens have makes no difference to a program."""
    rl, layout, answers = experiment.rl, program.layout, experiment.data.batch_size
    rows = f"{answers} rows" if rl.answers_per_row == 1 else f"{experiment.rows} rows of {rl.answers_per_row} answers"
    made = rl_programs(experiment, program, end_ids=tuple(range(len(rl.end_tokens))))
    params, frozen = layout.state["params"], layout.frozen
    options = experiment.runtime.compiler_options.of(meshes.platform(program.mesh)) or {}
    policy, batches, sample = (params, frozen["base"]), -(-rl.answers // answers), made.sample

    def scores(name: str, does: str, step: Any, batch: Any, reads: Any) -> list[Stage]:
        return [] if step is None else [Stage(name, does, batches, step, (params, frozen, batch), reads, options)]

    prompts = sample.shape.rows // sample.shape.samples
    drawn = (
        f"prefill of {prompts} prompts and a loop over at most {rl.new_tokens} tokens of {sample.shape.rows} answers"
    )
    arguments = (params, frozen, sample.batch, sample.iteration)
    score = made.score if updates(experiment) > 1 else None
    which = "base" if named(experiment.objective).reference == "base" else REFERENCE
    update, trained = (layout.state, frozen, program.batch), (layout.state, frozen["base"])
    return (
        Stage("rollout", drawn, rl.answers // sample.shape.rows, sample.run, arguments, policy, {}),
        *scores("reward", f"the reward model on {answers} texts", made.reward, made.judged, frozen.get(REWARD)),
        *scores("score", f"the policy on {rows}", score, made.scored, policy),
        *scores("reference", f"the reference on {rows}", made.reference, made.scored, frozen.get(which)),
        Stage("update", f"a train step on {rows}", updates(experiment), program.step, update, trained, options),
    )


def updates(experiment: RlExperiment) -> int:
    """Of an iteration."""
    return experiment.rl.epochs * experiment.rl.answers // experiment.data.batch_size


def _reward_program(program: Program, options: Any, *, longest: int) -> Any:
    """(params, frozen, batch) -> the number of each text of rows of at most `longest` tokens, replicated."""
    model = program.roles[REWARD].model
    if HEAD not in model.config.scalar_heads or model.config.architecture == "encoder":
        raise UsageError(
            f"config.roles.{REWARD}: this model is a {model.config.architecture} with the heads "
            f"{model.config.scalar_heads}; a reward model is a decoder or an encoder-decoder with the head {HEAD!r}, "
            "which config.objective.name='reward' trains"
        )
    if longest > model.config.max_length:
        raise UsageError(
            f"config.roles.{REWARD}: this model reads {model.config.max_length} tokens, and a prompt with its answer "
            f"may have {longest}; make config.data.length (or encoder_length) smaller, or give one that reads more"
        )
    role = frozen_role(model, REWARD)

    def judge(params, frozen, batch) -> jax.Array:
        return reward.rewards(role, params, frozen, batch, key=None)

    return jax.jit(judge, out_shardings=replicated(program.mesh), compiler_options=options)


def _text_widths(experiment: RlExperiment, program: Program, *, ended: bool) -> dict[str, int]:
    """Of the rows that a reward model reads, as in rl/rows.py; {} without one."""
    data, role = experiment.data, program.roles.get(REWARD)
    if role is None:
        return {}
    apart = "encoder_inputs" in role.model.inputs
    return text_widths(experiment.rl.new_tokens, data.length, data.encoder_length, apart=apart, ended=ended)


def _text_specs(experiment: RlExperiment, widths: Mapping[str, int]) -> dict[str, ArraySpec]:
    """Of the batch that a reward model reads."""
    return {
        name.replace("inputs", part): ArraySpec((experiment.data.batch_size, width), "int32", ("batch", None))
        for name, width in widths.items()
        for part in ("inputs", "segment_ids")
    }


def judge_start(program: Program, vocabulary: Vocabulary) -> int | None:
    """The start token of the reward model's decoder; None where it has no encoder, or there is no reward model."""
    role = program.roles.get(REWARD)
    if role is None or "encoder_inputs" not in role.model.inputs:
        return None
    return start_id(role.stored.start_token, vocabulary)


def _reference(which: str, program: Program) -> Role | None:
    """The model that a policy is kept near, as config.objective.grpo.reference says."""
    if which == "none":
        return None
    if which == "base":
        if tree.flatten(program.layout.frozen["base"]).keys() != tree.flatten(program.model.specs()).keys():
            raise UsageError(
                "config.objective.grpo.reference='base' is the policy without its adapters, and this run trains "
                "parameters of the model itself; use 'role' with config.roles.reference"
            )
        return frozen_role(program.model, "base")
    model = program.roles[REFERENCE].model
    for field in ("vocab_size", "architecture"):
        mine, theirs = (getattr(each.config, field) for each in (program.model, model))
        if mine != theirs:
            raise UsageError(
                f"config.model.{field}={mine!r}, but config.roles.reference has {theirs!r}; the divergence needs the "
                "same tokens, read from the same arrays"
            )
    return frozen_role(model, REFERENCE)


def prompt_room(experiment: RlExperiment) -> int:
    """The most tokens of a prompt."""
    data = experiment.data
    return data.encoder_length or data.length + 1 - experiment.rl.new_tokens


def tokens_per_step(experiment: RlExperiment) -> int:
    data, rl = experiment.data, experiment.rl
    if rl.answers_per_row == 1:
        return data.batch_size * (data.length + data.encoder_length)
    return experiment.rows * (prompt_room(experiment) + rl.answers_per_row * (rl.new_tokens - 1))


def with_rollouts(program: Program, buffers: Mapping[str, np.ndarray]) -> Layout:
    """The layout of a run, with the buffers of its answers as one more part of what a checkpoint holds."""
    layout, everywhere = program.layout, replicated(program.mesh)
    arrays = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere) for name, array in buffers.items()
    }
    axes = {name: (None,) * array.ndim for name, array in buffers.items()}
    return dataclasses.replace(
        layout, state={**layout.state, "rollouts": arrays}, axes={**layout.axes, "rollouts": axes}
    )


def check_rows(experiment: RlExperiment, sizes: Mapping[str, int]) -> None:
    """Rows lie on the data shards, of answers that are decoded at once and of an update."""
    rules = sharding_rules.rules(experiment.mesh.rules)
    shards = math.prod(sizes[axis] for axis in rules.mesh_axes("batch"))
    rows = experiment.rl.rows or experiment.rl.answers
    if rows % shards:
        raise UsageError(
            f"config.rl.rows={experiment.rl.rows} decodes {rows} answers at once, which is not divisible by the "
            f"{shards} data shards; use {multiples(rows, shards)}"
        )
    count, parts = experiment.rl.answers_per_row, shards * experiment.loop.micro_batches
    if count == 1:
        return
    if experiment.rows % parts:
        raise UsageError(
            f"config.rl.answers_per_row={count} makes {experiment.rows} rows of config.data.batch_size="
            f"{experiment.data.batch_size} answers, which are not divisible by {shards} data shards x micro-batches = "
            f"{parts}; use fewer answers a row, or a batch_size of {multiples(count * experiment.rows, count * parts)}"
        )
    if any(sizes[axis] > 1 for axis in rules.mesh_axes("length")):
        raise UsageError(
            f"config.rl.answers_per_row={count}: rows whose answers share a prompt are not divided along their length; "
            "leave it 1 on a mesh with the axis 'sequence', or set that axis to 1"
        )


def facts(experiment: RlExperiment) -> dict[str, str]:
    """For the start screen."""
    rl, config = experiment.rl, named(experiment.objective)
    count = updates(experiment)
    return {
        "an iteration": f"{rl.prompts} prompts x {rl.samples} answers of at most {rl.new_tokens} tokens, {count} "
        f"update{'s' * (count > 1)} of {experiment.data.batch_size} answers, {rl.answers_per_row} a row",
        "rewards": ", ".join(f"{part.weight:g} x {name} ({part.kind})" for name, part in rl.rewards.items()),
        "advantages": f"divided by std (ddof {rl.advantage.ddof}) + {rl.advantage.epsilon:g}"
        if rl.advantage.scale == "std"
        else "not scaled",
        "loss": f"aggregated by {config.aggregation}, clipped at -{config.clip_low:g} and +{config.clip_high:g}, "
        f"KL {config.kl_coefficient:g}, temperature {config.temperature:g}",
    }
