"""Decoding with a KV cache: one prefill of all prompts, then one token a row and step until all rows have ended.

An encoder-decoder first runs its encoder on the sources, once; its prompts are what its decoder begins with. Batching
of requests that come and go, paging and streaming are not here.

Names: B batch (rows), R rows that go on from them, T prompt length (padded), S source length (padded), V vocabulary.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from t5x_like.core.types import Tree
from t5x_like.inference.sampling import Sampling, sample
from t5x_like.inference.weights import for_decoding
from t5x_like.layers.scoring.head import logits
from t5x_like.models.model import Model

# Prompts and answers are padded to multiples of this, so that few different shapes are compiled.
BUCKET = 64


def decode_step(
    model: Model, params: Tree, cache: Any, tokens_B: Int[Array, " B"], positions_B: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Any]:
    """Float32 logits of the next token of each row, and the cache with the tokens written. Position -1: padding."""
    batch = {"inputs": tokens_B[:, None], "positions": positions_B[:, None]}
    output = model.apply(params, batch, cache=cache)
    return logits(*model.score_input(params, output))[:, 0], output.cache


def prefill(
    model: Model, params: Tree, cache: Any, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Any]:
    """Float32 logits after each prompt, and the cache that holds the prompts in its first rows. Rows are padded on the
    right; a row of length 0 is all padding, and its logits say nothing."""
    segments_BT = (jnp.arange(tokens_BT.shape[1])[None, :] < lengths_B[:, None]).astype(jnp.int32)
    batch = {"inputs": tokens_BT, "segment_ids": segments_BT}
    output = model.prefill(params, cache, batch, jnp.arange(tokens_BT.shape[0]))
    last_B1D = jnp.take_along_axis(output.hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    last = dataclasses.replace(output, hidden_BTD=last_B1D)
    return logits(*model.score_input(params, last))[:, 0], output.cache


def read_prompts(
    model: Model,
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    source: Mapping[str, Array],
    *,
    length: int,
) -> tuple[Float[Array, "B V"], Any]:
    """What decoding begins with: float32 logits after each prompt, and a cache of `length` tokens a row that holds it.
    source: what an encoder reads, {} without one."""
    cache = model.start(params, source, rows=len(tokens_BT), length=length)
    return prefill(model, params, cache, tokens_BT, lengths_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continued:
    """New tokens of each row. lengths: how many, the stop token among them; stopped: whether there is one. Behind the
    end tokens are the `fill` of the call. logp: of each token under what it was drawn from; None where not wanted."""

    tokens_BN: Any
    lengths_B: Any
    stopped_B: Any
    logp_BN: Any


def continue_rows(
    model: Model,
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    keys_R: Array,
    source: Mapping[str, Array],
    *,
    samples: int,
    limit: Int[Array, ""],
    steps: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    fill: int,
    scored: bool,
) -> Continued:
    """Up to `limit` <= `steps` new tokens a row, the last of them one of `stop_ids`. For use under jit.

    samples: rows that go on from each prompt, R = B samples, one behind the other; a prompt is computed once for all of
    them. source: what an encoder reads, {} without one. scored: also the log-probability of each new token after
    temperature; top-k and top-p do not enter it.
    """
    rows, length = len(keys_R), tokens_BT.shape[1]
    logits_BV, cache = read_prompts(model, params, tokens_BT, lengths_B, source, length=length + steps)
    if samples > 1:
        cache = {name: part.repeated(samples) for name, part in cache.items()}
        logits_BV, lengths_B = (jnp.repeat(x, samples, axis=0) for x in (logits_BV, lengths_B))
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)

    def pick(logits_BV: jax.Array, index: jax.Array) -> jax.Array:
        return sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_R, index), sampling)

    def going(carry) -> jax.Array:
        ended_B, index = carry[-2:]
        return (index < limit) & ~jnp.all(ended_B)

    def step(carry):
        cache, logits_BV, out_BN, logp_BN, lengths_new_B, ended_B, index = carry
        picked_B = pick(logits_BV, index)
        token_B = jnp.where(ended_B, fill, picked_B)
        if scored:
            each_B = jnp.where(ended_B, 0.0, _log_probability(logits_BV, picked_B, sampling))
            logp_BN = jax.lax.dynamic_update_slice_in_dim(logp_BN, each_B[:, None], index, axis=1)
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], index, axis=1)
        lengths_new_B = jnp.where(ended_B, lengths_new_B, index + 1)
        ended_B |= jnp.any(picked_B[:, None] == stops[None, :], axis=1)
        logits_BV, cache = decode_step(model, params, cache, token_B, jnp.where(ended_B, -1, lengths_B + index))
        return cache, logits_BV, out_BN, logp_BN, lengths_new_B, ended_B, index + 1

    carry = (
        *(cache, logits_BV, jnp.full((rows, steps), fill, jnp.int32)),
        jnp.zeros((rows, steps), jnp.float32) if scored else None,
        *(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.zeros((), jnp.int32)),
    )
    _, _, out_BN, logp_BN, lengths_new_B, ended_B, _ = jax.lax.while_loop(going, step, carry)
    return Continued(out_BN, lengths_new_B, ended_B, logp_BN)


def _log_probability(logits_BV: jax.Array, tokens_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Of tokens after temperature; greedy tokens are judged at temperature 1."""
    logp_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32) / (sampling.temperature or 1.0), axis=-1)
    return jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=1)[:, 0]


# With the compiler's default options: the products of one token a row are a third faster with YNNPACK than with the
# library that is faster for long rows (docs/log.md).
@functools.partial(jax.jit, static_argnames=("model", "steps", "sampling", "stop_ids"))
def _continue(
    params: Tree,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    limit: Int[Array, ""],
    keys_B: Array,
    source: Mapping[str, Array],
    *,
    model: Model,
    steps: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Int[Array, "B steps"]:
    """Up to `limit` <= `steps` new tokens a row; what follows a row's stop token is the first of `stop_ids`."""
    return continue_rows(
        model,
        params,
        tokens_BT,
        lengths_B,
        keys_B,
        source,
        samples=1,
        limit=limit,
        steps=steps,
        sampling=sampling,
        stop_ids=stop_ids,
        fill=stop_ids[0],
        scored=False,
    ).tokens_BN


def generate(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_ids: Sequence[int] = (),
    sources: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt before the first of `stop_ids`. Prompts must hold at least one token each.

    sources: what the encoder of an encoder-decoder reads, one for each prompt; the prompt then is the decoder's start
    token, and what else its answer shall begin with. The same seed gives the same tokens for a prompt at the same place
    in the list, whatever the other prompts are. Who generates often hands over what `weights.for_decoding` gave once.
    """
    if (sources is not None) != ("encoder_inputs" in model.inputs):
        raise ValueError("generate needs sources for a model with an encoder, and for no other")
    tokens, lengths = padded(model, prompts)
    source = {} if sources is None else encoder_batch(*padded(model, sources))
    if len(source.get("encoder_inputs", prompts)) != len(prompts):
        raise ValueError("generate needs as many sources as prompts")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
    stops = tuple(dict.fromkeys(stop_ids)) or (-1,)
    model, params = for_decoding(model, params)
    new = _continue(
        params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray(max_new_tokens, jnp.int32),
        keys,
        {name: jnp.asarray(array) for name, array in source.items()},
        model=model,
        steps=bucket(max_new_tokens),
        sampling=sampling,
        stop_ids=stops,
    )
    rows = np.asarray(new)[:, :max_new_tokens].tolist()
    return [[*itertools.takewhile(lambda token: token not in stops, row)] for row in rows]


def padded(model: Model, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, T], lengths [B]) of texts in rows of a common length, padded on the right."""
    lengths = np.array([len(text) for text in texts], np.int32)
    if not len(texts) or lengths.min() == 0:
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    tokens = np.zeros((len(texts), row_length(model, lengths.max())), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens, lengths


def encoder_batch(tokens_BS: np.ndarray, lengths_B: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays that an encoder reads of padded sources: each row one segment, its padding segment 0."""
    inside = np.arange(tokens_BS.shape[1]) < lengths_B[:, None]
    return {"encoder_inputs": tokens_BS, "encoder_segment_ids": inside.astype(np.int32)}


def bucket(length: int) -> int:
    """`length` rounded up to a multiple of BUCKET."""
    return -(-int(length) // BUCKET) * BUCKET


def row_length(model: Model, length: int) -> int:
    """Tokens of a padded row that holds `length`: `bucket`, but padding alone never makes it too long for the model."""
    return max(int(length), min(bucket(length), model.config.max_length))
