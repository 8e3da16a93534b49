"""How one tensor of theirs holds one layer of one leaf of ours: an equation of named dims, read in both directions.

    "(N H) D -> D N H"            a matrix that theirs stores [out, in], out being heads times their size
    "D (part N H) -> part D N H"  one matrix of theirs that holds several leaves of ours

The left side is their tensor, the right side ours; brackets join dims into one, the last named running fastest (as in
einops, github.com/arogozhnikov/einops). `part` is the number of the leaf among those that share the tensor. A region of
our leaf is a set of runs of consecutive elements of theirs, so that any piece can be read or written in place.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_like.storage.streams import Region

_PART = "part"


@dataclasses.dataclass(frozen=True)
class Layout:
    """An equation with its sizes. `shape`: of their whole tensor; `part`: our number in it, None if we are alone."""

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int]
    part: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[dim] for dim in group) for group in self.theirs)

    @property
    def dims(self) -> tuple[str, ...]:
        """Every named dim in the order in which theirs stores them."""
        return tuple(dim for group in self.theirs for dim in group)

    def span(self, region: Region) -> "Span":
        """Where theirs holds a region of ours. A joined dim of ours must be asked for whole (ValueError)."""
        wanted: dict[str, tuple[int, int]] = {}
        if self.part is not None:
            wanted[_PART] = (self.part, self.part + 1)
        for group, (begin, end) in zip(self.ours, region, strict=True):
            if len(group) == 1:
                wanted[group[0]] = (begin, end)
            elif (begin, end) == (0, math.prod(self.sizes[dim] for dim in group)):
                wanted.update({dim: (0, self.sizes[dim]) for dim in group})
            else:
                raise ValueError(f"part of the joined dim {group} in {region}")
        return Span(tuple(self.sizes[dim] for dim in self.dims), tuple(wanted[dim] for dim in self.dims))

    def to_ours(self, array: np.ndarray, region: Region) -> np.ndarray:
        """The elements of `span(region)`, as theirs orders them, in our order and shape. Copies nothing."""
        order = [self.dims.index(dim) for dim in self._our_dims()]
        return array.transpose(order).reshape([end - begin for begin, end in region])

    def to_theirs(self, array: np.ndarray, region: Region) -> np.ndarray:
        """The inverse of `to_ours`."""
        span, dims = self.span(region), self._our_dims()
        shape = dict(zip(self.dims, span.shape, strict=True))
        return array.reshape([shape[dim] for dim in dims]).transpose([dims.index(dim) for dim in self.dims])

    def chunk(self, itemsize: int, limit: int) -> tuple[int, ...]:
        """The shape of the pieces of ours, of at most `limit` bytes, that theirs holds in long runs."""
        pieces = dict(self.sizes) | ({_PART: 1} if self.part is not None else {})
        joined = {dim for group in self.ours if len(group) > 1 for dim in group}
        for dim in self.dims:
            total = math.prod(pieces.values()) * itemsize
            if total > limit and dim not in joined and dim != _PART:
                pieces[dim] = max(1, pieces[dim] * limit // total)
        return tuple(math.prod(pieces[dim] for dim in group) for group in self.ours)

    def _our_dims(self) -> list[str]:
        first = [_PART] if self.part is not None else []
        return first + [dim for group in self.ours for dim in group]


@dataclasses.dataclass(frozen=True)
class Span:
    """A box in a row-major array of shape `sizes`: one half-open interval a dim."""

    sizes: tuple[int, ...]
    box: Region

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(end - begin for begin, end in self.box)

    def runs(self) -> tuple[np.ndarray, int]:
        """(first elements, length) of the runs of consecutive elements that make up the box, in order."""
        inner = len(self.sizes)
        while inner and self.box[inner - 1] == (0, self.sizes[inner - 1]):
            inner -= 1
        length = math.prod(self.sizes[inner:])
        starts = np.zeros(1, np.int64)
        for dim in range(inner):
            begin, end = self.box[dim]
            stride = math.prod(self.sizes[dim + 1 :])
            if dim == inner - 1:
                starts, length = starts + begin * stride, length * (end - begin)
            else:
                starts = (starts[:, None] + np.arange(begin, end, dtype=np.int64)[None, :] * stride).ravel()
        return starts, length


def parse(
    equation: str, shape: Sequence[int], *, parts: int, part: int | None, sizes: Mapping[str, int], where: str
) -> Layout:
    """The layout of an equation for a leaf of ours with this shape (of one layer).

    `parts` leaves share the tensor if `part` is not None. `sizes`: of dims that are joined in ours; one of a group may
    be left out. An equation that is not one to one is a defect of its table: ValueError.
    """
    left, arrow, right = equation.partition("->")
    theirs, ours = _side(left), _side(right)
    if not arrow or (part is not None) != (ours[:1] == ((_PART,),)):
        raise ValueError(f"{where}: {equation!r} is no equation for {parts} leaves")
    ours = ours[1:] if part is not None else ours
    known = dict(sizes) | ({_PART: parts} if part is not None else {})
    if len(ours) != len(shape):
        raise ValueError(f"{where}: {equation!r} has other dims than {tuple(shape)}")
    for group, size in zip(ours, shape, strict=True):
        unknown = [dim for dim in group if dim not in known]
        rest = math.prod(known[dim] for dim in group if dim in known)
        if len(unknown) > 1 or size % rest:
            raise ValueError(f"{where}: {equation!r} does not say the sizes of {group}")
        known.update({dim: size // rest for dim in unknown})
    one = [dim for group in theirs for dim in group]
    two = [dim for group in ours for dim in group] + ([_PART] if part is not None else [])
    if sorted(one) != sorted(two) or len(set(one)) != len(one):
        raise ValueError(f"{where}: {equation!r} does not name the same dims on both sides")
    return Layout(theirs, ours, {dim: known[dim] for dim in one}, part)


def _side(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(found.strip("()").split()) for found in re.findall(r"\([^)]*\)|\S+", text))
