"""Log-likelihoods of any number of texts, in a few shapes of batches: for harnesses, rescoring and `log_likelihood`.

A text's numbers do not depend on the texts beside it: its batch has the shape that its own lengths ask for, filled up
with empty rows where texts are missing, so that one program computes it whatever the company. The head sees the scored
tokens alone: most of a question is context. An encoder-decoder scores targets after sources. Texts that are to be
generated are decode.py's.

Names: B batch (rows), T length, S source length, A scored tokens (padded), D model.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree
from t5x_like.layers.platform import platform
from t5x_like.layers.scoring.head import Head
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models.model import Model
from t5x_like.parallel.sharding import constrain, named, use_rules

# Tokens that one batch holds. A single short text costs as much as a whole batch, so a CPU wants few; a harness on an
# accelerator wants more.
TOKENS_PER_BATCH = 1024
TRUNCATE = ("error", "left")

Row = tuple[Sequence[int], int]  # tokens, the index of the first that is scored


@dataclasses.dataclass(frozen=True)
class Text:
    """A row beside its index in the input, and what an encoder reads before it (nothing without one)."""

    index: int
    ids: Sequence[int]
    first: int
    source: Sequence[int]


@dataclasses.dataclass(frozen=True, order=True)
class Lengths:
    """Of the padded rows of a batch: T; S, or 0 without an encoder; A, at most T."""

    inputs: int
    source: int
    scored: int


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """logp: sum of the natural log-probabilities of the scored tokens. greedy: whether each is the most probable one.
    tokens: how many are scored."""

    logp: float
    greedy: bool
    tokens: int


def score(
    model: Model,
    params: Tree,
    rows: Iterable[Row],
    *,
    sources: Iterable[Sequence[int]] | None = None,
    mesh: Mesh | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    truncate: str = "error",
) -> list[Likelihood]:
    """For each (ids, first): the likelihood of ids[first:] after ids[:first], in the order of the input.

    first is at least 1: the first token has nothing before it. The last token is not fed, so a text may have one token
    more than the model's max_length. Of a longer one truncate="left" drops the beginning, but nothing that is scored;
    "error" refuses it. sources: what the encoder of an encoder-decoder reads, one for each row, whose first token then
    is the decoder's start token; "left" drops beginnings of sources. mesh: params lie on it; rows are divided over its
    batch axes.
    """
    if truncate not in TRUNCATE:
        raise UsageError(f"truncate={truncate!r} should be one of {', '.join(TRUNCATE)}")
    if tokens_per_batch < 1:
        raise UsageError(f"tokens_per_batch={tokens_per_batch} should be at least 1")
    if (sources is not None) != ("encoder_inputs" in model.inputs):
        raise UsageError("score: a model with an encoder scores targets after sources, any other has no sources")
    found: dict[int, Likelihood] = {}
    waiting: dict[Lengths, list[Text]] = {}
    in_flight: list[tuple[list[Text], tuple[jax.Array, jax.Array]]] = []
    count = 0

    def send(lengths: Lengths) -> None:
        texts = waiting.pop(lengths)
        size = _rows(model, lengths, tokens_per_batch, mesh)
        in_flight.append((texts, _start(model, params, texts, size, lengths, mesh)))
        if len(in_flight) == 2:  # the host reads one batch while the device computes the next
            found.update(_results(*in_flight.pop(0)))

    pairs = ((row, None) for row in rows) if sources is None else zip(rows, sources, strict=True)
    for index, (row, source) in enumerate(pairs):
        count += 1
        text = _fitted(row, source, index, model.config.max_length, truncate)
        if text.first == len(text.ids):
            found[index] = Likelihood(0.0, True, 0)
            continue
        lengths = _lengths(text, model.config.max_length)
        texts = waiting.setdefault(lengths, [])
        texts.append(text)
        if len(texts) == _rows(model, lengths, tokens_per_batch, mesh):
            send(lengths)
    for lengths in sorted(waiting):
        send(lengths)
    for batch in in_flight:
        found.update(_results(*batch))
    return [found[index] for index in range(count)]


def score_rolling(
    model: Model,
    params: Tree,
    texts: Iterable[Sequence[int]],
    *,
    context: int = 1,
    mesh: Mesh | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Likelihood]:
    """The likelihood of all tokens of each text but its first, of any length, each scored once: `rolling_windows`."""
    counts = []

    def rows() -> Iterator[Row]:
        for ids in texts:
            windows = rolling_windows(ids, max_length=model.config.max_length, context=context)
            counts.append(len(windows))
            yield from windows

    parts = iter(score(model, params, rows(), mesh=mesh, tokens_per_batch=tokens_per_batch))
    return [_sum(list(itertools.islice(parts, count))) for count in counts]


def _sum(parts: Sequence[Likelihood]) -> Likelihood:
    return Likelihood(
        math.fsum(part.logp for part in parts), all(part.greedy for part in parts), sum(part.tokens for part in parts)
    )


def rolling_windows(ids: Sequence[int], *, max_length: int, context: int = 1) -> list[Row]:
    """(ids, first) rows in which each token but the first is scored once, as lm-evaluation-harness has them.

    Every window feeds max_length tokens as far as there are so many: the first scores all of them, a later one those
    that are new, with at least `context` tokens before them and the last window with as many as fit.

    >>> rolling_windows([0, 1, 2, 3, 4, 5], max_length=4)
    [([0, 1, 2, 3, 4], 1), ([1, 2, 3, 4, 5], 4)]
    """
    if not 1 <= context <= max_length:
        raise UsageError(f"context={context} should be from 1 to max_length={max_length}")
    rows: list[Row] = []
    scored = 1
    while scored < len(ids):
        step = max_length if not rows else max_length - context + 1
        end = min(scored + step, len(ids))
        start = max(0, end - max_length - 1)
        rows.append((ids[start:end], scored - start))
        scored = end
    return rows


def row_step() -> int:
    """Flash kernels need rows of multiples of 128; on a CPU padding costs more than a program."""
    return 64 if platform() == "cpu" else 128


def row_length(length: int, max_length: int) -> int:
    """The length of the padded row that holds `length` <= max_length tokens: a multiple of `row_step` up to eight of
    them, then a power of 2 or 3/4 of one. On a CPU:

    >>> [row_length(length, 2000) for length in (1, 64, 65, 129, 257, 385, 1025, 1600)]
    [64, 64, 128, 192, 320, 448, 1536, 2000]
    """
    step = row_step()
    if length <= 8 * step:
        return min(-(-max(length, 1) // step) * step, max_length)
    power = 1 << (length - 1).bit_length()
    shorter = power // 4 * 3
    return min(shorter if length <= shorter else power, max_length)


def _lengths(text: Text, max_length: int) -> Lengths:
    """Scored tokens are padded to one step, or to the whole row: at most two programs a length."""
    step, inputs = row_step(), row_length(len(text.ids) - 1, max_length)
    source = row_length(len(text.source), max_length) if text.source else 0
    return Lengths(inputs, source, min(inputs, step) if len(text.ids) - text.first <= step else inputs)


def _fitted(row: Row, source: Sequence[int] | None, index: int, max_length: int, truncate: str) -> Text:
    """The row with at most max_length + 1 tokens, and its source with at most max_length."""
    ids, first = row
    if not min(1, len(ids)) <= first <= len(ids):
        raise UsageError(f"score: row {index}: first={first} should be from 1 to its {len(ids)} tokens")
    if source is not None and not source:
        raise UsageError(f"score: the source of row {index} has no token; end it with EOS, as in training")
    cut = len(ids) - (max_length + 1)
    longer = len(source or ()) - max_length
    if truncate == "error" and cut > 0:
        raise UsageError(
            f"score: row {index} has {len(ids)} tokens, more than max_length + 1 = {max_length + 1} of this model; "
            "shorten the text, or drop its beginning with truncate='left'"
        )
    if truncate == "error" and longer > 0:
        raise UsageError(
            f"score: the source of row {index} has {len(source or ())} tokens, more than max_length={max_length} of "
            "this model; shorten it, or drop its beginning with truncate='left'"
        )
    if cut >= (first if source is None else 1):  # the start token of a decoder with an encoder stays
        raise UsageError(
            f"score: row {index} has {len(ids) - first} tokens to score, more than max_length={max_length} of this "
            "model; score a long text in rolling windows"
        )
    cut, longer = max(cut, 0), max(longer, 0)
    return Text(index, ids[cut:], first - cut, () if source is None else source[longer:])


def _rows(model: Model, lengths: Lengths, tokens_per_batch: int, mesh: Mesh | None) -> int:
    """Rows of the batches of these lengths, which the batch axes of the mesh divide."""
    shards = batch_shards(model, mesh)
    return max(1, tokens_per_batch // ((lengths.inputs + lengths.source) * shards)) * shards


def batch_shards(model: Model, mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are divided."""
    sizes = {} if mesh is None else dict(mesh.shape)
    return math.prod(sizes.get(name, 1) for name in model.rules.mesh_axes("batch"))


def _start(model: Model, params: Tree, texts: Sequence[Text], rows: int, lengths: Lengths, mesh: Mesh | None):
    """Begins to compute a batch: (log-probabilities, whether the target is the most probable token), both [B, A]."""
    inputs_BT = np.zeros((rows, lengths.inputs), np.int32)
    sources_BS, segments_BS = np.zeros((2, rows, lengths.source), np.int32)
    targets_BA, places_BA = np.zeros((2, rows, lengths.scored), np.int32)
    for row, text in enumerate(texts):
        scored = len(text.ids) - text.first
        inputs_BT[row, : len(text.ids) - 1] = text.ids[:-1]
        targets_BA[row, :scored] = text.ids[text.first :]
        places_BA[row, :scored] = np.arange(text.first - 1, len(text.ids) - 1)
        sources_BS[row, : len(text.source)] = text.source
        segments_BS[row, : len(text.source)] = 1
    arrays = {"inputs": inputs_BT, "targets": targets_BA, "places": places_BA}
    if lengths.source:
        arrays |= {"encoder_inputs": sources_BS, "encoder_segment_ids": segments_BS}
    if mesh is None:
        return _scores(model, params, {name: jnp.asarray(array) for name, array in arrays.items()})
    placed = {}
    for name, array in arrays.items():
        sharding = named(mesh, model.rules, ("batch", "length"), array.shape)
        placed[name] = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
    with jax.set_mesh(mesh):
        return _scores(model, params, placed)


@functools.partial(jax.jit, static_argnums=0)
def _scores(model: Model, params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden_BTD, head = _hidden_and_head(model, params, batch)
    with use_rules(model.rules):
        scored_BAD = jnp.take_along_axis(hidden_BTD, batch["places"][:, :, None], axis=1)
        scored_BAD = constrain(scored_BAD, "batch", "length", None)
        scores = token_scores(scored_BAD, head, batch["targets"], want=("logp", "best"))
        # Every process reads all results.
        return constrain(scores.logp, None, None), constrain(scores.best == batch["targets"], None, None)


def _hidden_and_head(model: Model, params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, Head]:
    read = {name: array for name, array in batch.items() if name in model.inputs}
    return model.score_input(params, model.apply(params, read))


def _results(texts: Sequence[Text], scores: tuple[jax.Array, jax.Array]) -> dict[int, Likelihood]:
    """Sums in float64 over the scored tokens of each text, by its place in the input."""
    logp_BA, greedy_BA = map(np.asarray, scores)
    found = {}
    for row, text in enumerate(texts):
        scored = len(text.ids) - text.first
        logp = float(np.sum(logp_BA[row, :scored], dtype=np.float64))
        found[text.index] = Likelihood(logp, bool(greedy_BA[row, :scored].all()), scored)
    return found
