"""Answers of the policy, drawn from the parameters that are being trained, on their mesh: one jitted program.

The key of an answer is that of (seed, iteration, prompt, sample), and folds in the place of each token: the same tokens
come whatever rows are decoded together. A prompt is padded to a fixed length, so that nothing is compiled again, and
is computed once for the answers to it that stand in one call.

Names: R rows decoded at once, P prompts that they answer, T prompt length, S source length, N new tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.inference.decode import continue_rows, encoder_batch
from t5x_like.inference.sampling import Sampling
from t5x_like.inference.weights import for_decoding, serving_params
from t5x_like.objectives.interface import Role
from t5x_like.parallel.sharding import abstract_batch, replicated

_PURPOSE = 0x726F6C6C  # sets these keys apart from those of dropout, which begin with the seed too


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one call of the program. samples: of its rows, one behind the other, answer the same prompt. source: tokens
    that an encoder reads, 0 without one."""

    rows: int
    samples: int
    prompt: int
    source: int
    new: int


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The jitted program `(params, frozen, batch, iteration) -> {tokens, lengths, stopped, logp}`, each replicated."""

    run: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    iteration: jax.ShapeDtypeStruct
    shape: Shape


def rollout_program(
    role: Role, mesh: Mesh, shape: Shape, *, sampling: Sampling, end_ids: tuple[int, ...], seed: int, options: Any
) -> Rollout:
    model = role.model

    def run(params, frozen, batch: Mapping[str, Array], iteration: Int[Array, ""]) -> dict[str, jax.Array]:
        whole = serving_params(model, role.whole(params, frozen))
        decoding, parameters = for_decoding(model, whole)
        source = {name: batch[name] for name in ("encoder_inputs", "encoder_segment_ids") if name in batch}
        found = continue_rows(
            decoding,
            parameters,
            batch["inputs"],
            batch["lengths"],
            answer_keys(seed, iteration, batch["prompt"], batch["sample"]),
            source,
            samples=shape.samples,
            limit=jnp.asarray(shape.new, jnp.int32),
            steps=shape.new,
            sampling=sampling,
            stop_ids=end_ids,
            fill=0,
            scored=True,
        )
        return {
            "tokens": found.tokens_BN,
            "lengths": found.lengths_B,
            "stopped": found.stopped_B.astype(jnp.int32),
            "logp": found.logp_BN,
        }

    prompts = shape.rows // shape.samples
    specs = {"inputs": _rows(prompts, shape.prompt), "lengths": _numbers(prompts)}
    specs |= {"prompt": _numbers(shape.rows), "sample": _numbers(shape.rows)}
    if shape.source:
        specs |= {name: _rows(prompts, shape.source) for name in ("encoder_inputs", "encoder_segment_ids")}
    iteration = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    jitted = jax.jit(run, out_shardings=replicated(mesh), compiler_options=options)
    return Rollout(jitted, abstract_batch(mesh, model.rules, specs), iteration, shape)


def _rows(rows: int, length: int) -> ArraySpec:
    return ArraySpec((rows, length), "int32", ("batch", None))


def _numbers(rows: int) -> ArraySpec:
    return ArraySpec((rows,), "int32", ("batch",))


def together(rows: int, samples: int, shards: int) -> int:
    """The most answers to a prompt that can share it in a call of `rows`, of which each shard has whole prompts.

    >>> together(64, 8, 4), together(64, 8, 16), together(12, 8, 1)
    (8, 4, 4)
    """
    return max(count for count in range(1, samples + 1) if samples % count == 0 and rows % (count * shards) == 0)


def answer_keys(seed: int, iteration: Any, prompt_R: Any, sample_R: Any) -> jax.Array:
    """The key of each answer."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PURPOSE), iteration)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample))(
        prompt_R, sample_R
    )


def rollout_batch(
    ids: Sequence[Sequence[int]], shape: Shape, *, prompt: np.ndarray, sample: np.ndarray, start: int
) -> dict[str, np.ndarray]:
    """The arrays of a call, of prompts (or sources) `ids`, one for every `shape.samples` of its rows; `start`: the
    token that a decoder with an encoder begins with."""
    width = shape.source or shape.prompt
    tokens, lengths = np.zeros((len(ids), width), np.int32), np.array([len(each) for each in ids], np.int32)
    for row, each in enumerate(ids):
        tokens[row, : len(each)] = each
    numbers = {"prompt": prompt.astype(np.int32), "sample": sample.astype(np.int32)}
    if not shape.source:
        return {"inputs": tokens, "lengths": lengths} | numbers
    begins = {"inputs": np.full((len(ids), 1), start, np.int32), "lengths": np.ones(len(ids), np.int32)}
    return encoder_batch(tokens, lengths) | begins | numbers


def end_ids(names: Sequence[str], vocabulary: Vocabulary) -> tuple[int, ...]:
    """The ids of `config.rl.end_tokens`. Raises UsageError for a text that is not one token."""
    found = []
    for name in names:
        token = vocabulary.eos_id if name == "eos" else vocabulary.one_token(name)
        if token is None:
            count = "no token" if name == "eos" else f"{len(vocabulary.encode(name))} tokens"
            raise UsageError(
                f"config.rl.end_tokens: {name!r} is {count} of this tokenizer; name 'eos' if it has one, a special "
                "token, or a text that is exactly one token"
            )
        found.append(token)
    return tuple(dict.fromkeys(found))
