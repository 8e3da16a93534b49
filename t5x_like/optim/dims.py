"""What the logical axes of a parameter say about its dims: which stack equal tensors, which are a matrix's sides.

Optimizers that look at a tensor as a whole (Adafactor, Muon) ask here and never count dims themselves.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from t5x_like.core.types import Axes

# Dims that stack tensors of their own: statistics never mix over them.
BATCH_AXES = ("layers", "experts")
# Neighbouring dims that together are one side of a matrix: q is embed x (heads*head), o is (heads*head) x embed.
_JOINED = ("heads", "kv_heads", "head")
# A table of vectors or a vector, whatever its number of dims.
_NO_MATRIX = ("vocab", "positions", "norm", None)

Sides: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # (dims of the input side, dims of the output side)


def single(axes: Axes) -> Axes:
    """The axes of one of the stacked tensors.

    >>> single(("layers", "experts", "embed", "mlp"))
    ('embed', 'mlp')
    """
    return tuple(axis for axis in axes if axis not in BATCH_AXES)


def sides(axes: Axes) -> tuple[tuple[int, ...], ...]:
    """Dims of one tensor grouped into sides, in order; `axes` are those of `single`.

    >>> sides(("embed", "heads", "head"))
    ((0,), (1, 2))
    """
    groups: list[tuple[int, ...]] = []
    for dim, axis in enumerate(axes):
        if groups and axis in _JOINED and axes[dim - 1] in _JOINED:
            groups[-1] += (dim,)
        else:
            groups.append((dim,))
    return tuple(groups)


def matrix(axes: Axes) -> Sides | None:
    """The two sides of one tensor that maps vectors to vectors; None for tables, norms, biases and other shapes.

    >>> matrix(("heads", "head", "embed")), matrix(("vocab", "embed")), matrix(("heads", "head"))
    (((0, 1), (2,)), None, None)
    """
    groups = sides(axes)
    if len(groups) != 2 or any(axis in _NO_MATRIX for axis in axes):
        return None
    return groups[0], groups[1]


def over_batch_dims(
    function: Callable[..., Any], *, inputs: Sequence[Axes], outputs: Sequence[Axes]
) -> Callable[..., Any]:
    """`function` of single tensors, vmapped over the stacking dims; `inputs` and `outputs` are the stacked axes.

    `function` takes positional arrays and returns a tuple of arrays. Every array has the same stacking axes.
    """
    stacked = [axis for axis in inputs[0] if axis in BATCH_AXES]
    if not stacked:
        return function
    outer = stacked[0]

    def without(axes: Axes) -> Axes:
        return tuple(axis for axis in axes if axis != outer)

    inner = over_batch_dims(
        function, inputs=[without(axes) for axes in inputs], outputs=[without(axes) for axes in outputs]
    )
    return jax.vmap(
        inner,
        in_axes=tuple(axes.index(outer) for axes in inputs),
        out_axes=tuple(axes.index(outer) for axes in outputs),
    )
