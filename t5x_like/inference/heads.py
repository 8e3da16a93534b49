"""What a scalar head says of whole texts, such as a reward: the number at the last token of each.

As in score.py a text's number does not depend on the texts beside it: its batch has the shape that its length asks for.

Names: B batch (rows), T length, S source length.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.inference.score import TOKENS_PER_BATCH, batch_shards, row_length
from t5x_like.models.model import Model
from t5x_like.parallel.sharding import constrain, named, use_rules

Ids = Sequence[int]


def read_last(
    model: Model,
    params: Tree,
    texts: Sequence[Ids],
    *,
    sources: Sequence[Ids] | None,
    head: str,
    mesh: Mesh | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Float[np.ndarray, " n"]:
    """The number of `head` at the last token of each text, float32. sources: what an encoder reads, if there is one."""
    if head not in model.config.scalar_heads:
        known = ", ".join(model.config.scalar_heads) or "none"
        raise UsageError(f"this model has no scalar head {head!r} (config.model.scalar_heads); it has {known}")
    limit = model.config.max_length
    groups: dict[tuple[int, int], list[int]] = {}
    for index, text in enumerate(texts):
        read = [text] if sources is None else [text, sources[index]]
        for ids in read:
            if not 0 < len(ids) <= limit:
                raise UsageError(
                    f"text {index} has {len(ids)} tokens, and this model reads from 1 to max_length={limit}; shorten it"
                )
        source = 0 if sources is None else row_length(len(sources[index]), limit)
        groups.setdefault((row_length(len(text), limit), source), []).append(index)
    found = np.zeros(len(texts), np.float32)
    for (length, source), members in sorted(groups.items()):
        shards = batch_shards(model, mesh)
        rows = max(1, tokens_per_batch // ((length + source) * shards)) * shards
        for first in range(0, len(members), rows):
            chosen = members[first : first + rows]
            arrays = _arrays("", [texts[index] for index in chosen], (rows, length))
            if sources is not None:
                arrays |= _arrays("encoder_", [sources[index] for index in chosen], (rows, source))
            found[chosen] = _read(model, params, arrays, head, mesh)[: len(chosen)]
    return found


def _arrays(prefix: str, rows: Sequence[Ids], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """{inputs, segment_ids}, padded on the right, with empty rows behind."""
    tokens, segments = np.zeros((2, *shape), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    return {f"{prefix}inputs": tokens, f"{prefix}segment_ids": segments}


def _read(model: Model, params: Tree, arrays: dict[str, np.ndarray], head: str, mesh: Mesh | None) -> np.ndarray:
    if mesh is None:
        return np.asarray(_last(model, head, params, arrays))
    placed = {}
    for name, array in arrays.items():
        sharding = named(mesh, model.rules, ("batch", "length"), array.shape)
        placed[name] = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    with jax.set_mesh(mesh):
        return np.asarray(_last(model, head, params, placed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last(model: Model, head: str, params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    """[B], of an empty row what stands at its first token."""
    each_BT = model.read(params, model.apply(params, batch), head)
    last_B = (batch["segment_ids"] > 0).sum(axis=1).clip(1) - 1
    with use_rules(model.rules):  # every process reads all of them
        return constrain(jnp.take_along_axis(each_BT, last_B[:, None], axis=1)[:, 0], None)
