"""Arrays as a compiled program lays them out: bytes with the padding of tiles, and the memory that each lies in.

A shape such as `bf16[4,4096]{1,0:T(8,128)(2,1)S(1)}` holds dims, their order from minor to major, tiles and a memory
space. The two minor dims are padded to whole tiles of 8 x 128; further tiles order what is inside and pad nothing.
"""

import dataclasses
import functools
import math
import re
from typing import TypeAlias

from t5x_like.planner import hlo

HBM, VMEM, HOST = 0, 1, 5  # memory spaces; others are small memories of scalars and semaphores
_LEAF = re.compile(r"^([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::(.*))?\})?$")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """text: without its layout, such as bf16[4,4096]; bytes: with padding; space: HBM, VMEM, HOST or another."""

    text: str
    dims: tuple[int, ...]
    bytes: int
    space: int


# An array, or a tuple of these.
Tree: TypeAlias = "Array | tuple[Tree, ...]"


@functools.lru_cache(maxsize=100_000)
def tree(shape: str) -> Tree:
    """The arrays of a shape as HLO writes it; tokens and what is not understood have no bytes.

    >>> tree("f32[4,100]{1,0:T(8,128)}").bytes, tree("(bf16[], token[])")[1].bytes
    (4096, 0)
    """
    shape = _COMMENT.sub("", shape).strip()
    if shape.startswith("("):
        return tuple(tree(part) for part in hlo.split(shape[1:-1]) if part.strip())
    found = _LEAF.match(shape)
    if not found:
        return Array(shape, (), 0, HBM)
    dtype, sizes, order, layout = found.groups()
    dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    space = _SPACE.search(layout or "")
    minor_to_major = [int(dim) for dim in order.split(",") if dim] if order else list(range(len(dims)))[::-1]
    count = math.prod(_padded([dims[dim] for dim in reversed(minor_to_major)], layout or ""))
    return Array(
        f"{dtype}[{sizes}]", dims, math.ceil(count * hlo.bits(dtype) / 8), int(space.group(1)) if space else HBM
    )


def leaves(value: Tree) -> list[Array]:
    """All arrays of a tree, in order."""
    return [value] if isinstance(value, Array) else [leaf for part in value for leaf in leaves(part)]


def _padded(physical: list[int], layout: str) -> list[int]:
    """Sizes from major to minor, padded to the first tile."""
    found = _TILE.search(layout)
    if not found or "*" in found.group(1):
        return physical
    tile = [int(size) for size in found.group(1).split(",")]
    physical = [1] * (len(tile) - len(physical)) + physical
    start = len(physical) - len(tile)
    return physical[:start] + [-(-size // part) * part for size, part in zip(physical[start:], tile, strict=True)]
