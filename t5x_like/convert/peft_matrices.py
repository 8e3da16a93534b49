"""The A and B of one module of the peft package, and those of our weights that the module holds.

Theirs: A [rank, in], B [out, rank]; of an embedding A is [rank, vocabulary], B [width, rank]. Ours: a [inputs ...,
rank], b [rank, outputs ...]; of a table of the vocabulary, which is the embedding or the LM head, a [vocabulary, rank],
b [rank, width].

A module that holds several of our weights side by side (GPT-2's queries, keys and values) gets the A of all, one below
the other, and a B that is zero but for a block each: its rank is the sum of theirs.

Legend: R rank, V vocabulary, D width.
"""

from collections.abc import Sequence

import numpy as np

from t5x_like.convert.layout import Layout

PART = "part"  # the dim of a layout that counts our weights in one tensor of theirs
Pair = tuple[np.ndarray, np.ndarray]


def to_theirs(layout: Layout, a: np.ndarray, b: np.ndarray) -> Pair:
    """(A, B) of one weight."""
    count = a.ndim - 1
    return _matrix(layout, a, count, inputs=True), _matrix(layout, b, count, inputs=False)


def to_ours(layout: Layout, theirs: Pair) -> Pair:
    """(a, b) of one weight; the inverse of `to_theirs`."""
    count = inputs_of(layout)
    return _unmatrix(layout, theirs[0], count, inputs=True), _unmatrix(layout, theirs[1], count, inputs=False)


def together(parts: Sequence[tuple[int, Pair]], count: int) -> Pair:
    """(A, B) of a module that holds `count` weights of one shape side by side, of those that are adapted: (number of
    the weight, its A and B)."""
    out = parts[0][1][1].shape[0]
    whole = np.zeros((count * out, sum(len(a) for _, (a, _) in parts)), np.float32)
    begin = 0
    for number, (a, b) in parts:
        whole[number * out : (number + 1) * out, begin : begin + len(a)] = b
        begin += len(a)
    return np.concatenate([a for _, (a, _) in parts]), whole


def apart(theirs: Pair, number: int, count: int) -> Pair:
    """(A, B) of one of the `count` weights that a module holds side by side; the inverse of `together`. What its block
    of B does not use is left out."""
    a, b = theirs
    out = len(b) // count
    block = b[number * out : (number + 1) * out]
    used = np.abs(block).max(axis=0) > 0
    return (a[used], block[:, used]) if used.any() else (a, block)


def table_to_theirs(a: np.ndarray, b: np.ndarray, vocab: int, *, lookup: bool) -> Pair:
    """Of a table of the vocabulary: an embedding, or the matrix of an LM head, whose inputs are the width."""
    return (a[:vocab].T, b.T) if lookup else (b, a[:vocab])


def table_to_ours(theirs: Pair, rows: int, *, lookup: bool) -> Pair:
    """The inverse, with zeros where our table is padded to so many rows."""
    a, b = (theirs[0].T, theirs[1].T) if lookup else (theirs[1], theirs[0])
    return np.pad(a, [(0, rows - len(a)), (0, 0)]), b


def inputs_of(layout: Layout) -> int:
    """How many of our dims are inputs: ours come first, and theirs are one of the two groups."""
    for count in range(1, len(layout.ours)):
        names = {name for group in layout.ours[:count] for name in group}
        if any(set(group) == names for group in _groups(layout)):
            return count
    raise ValueError(f"{layout.theirs} is no matrix")


def _groups(layout: Layout) -> list[list[str]]:
    return [[name for name in group if name != PART] for group in layout.theirs]


def _matrix(layout: Layout, ours: np.ndarray, inputs_count: int, *, inputs: bool) -> np.ndarray:
    """[rank, in] of our A [inputs ..., rank], or [out, rank] of our B [rank, outputs ...]."""
    names, order = _side(layout, inputs_count, inputs=inputs)
    moved = ours if inputs else np.moveaxis(ours, 0, -1)
    joined = moved.transpose(*(names.index(name) for name in order), len(names)).reshape(-1, moved.shape[-1])
    return joined.T if inputs else joined


def _unmatrix(layout: Layout, theirs: np.ndarray, inputs_count: int, *, inputs: bool) -> np.ndarray:
    """The inverse of `_matrix`."""
    names, order = _side(layout, inputs_count, inputs=inputs)
    joined = theirs.T if inputs else theirs
    split = joined.reshape(*(layout.sizes[name] for name in order), joined.shape[-1])
    moved = split.transpose(*(order.index(name) for name in names), len(order))
    return moved if inputs else np.moveaxis(moved, -1, 0)


def _side(layout: Layout, inputs_count: int, *, inputs: bool) -> tuple[list[str], list[str]]:
    """The dims of one side of a matrix: in our order, and in theirs."""
    groups = layout.ours[:inputs_count] if inputs else layout.ours[inputs_count:]
    names = [name for group in groups for name in group]
    return names, next(group for group in _groups(layout) if set(group) == set(names))
