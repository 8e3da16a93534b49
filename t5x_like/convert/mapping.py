"""One table of a family, applied strictly: every tensor of theirs and every leaf of ours is covered exactly once.

A table is a list of rows; the same rows read a foreign model (`Reading`) and write one (`ModelMap.write`). Our leaf
holds all layers in one array, theirs is one tensor a layer: `{layer}` in a row's name counts them. Rows that pad the
vocabulary are ours alone: zeros when read, dropped when written.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (numpy learns the names of bfloat16 and its kin)
import numpy as np

from t5x_like.convert import scratch
from t5x_like.convert.layout import Layout, Span, parse
from t5x_like.core.errors import UserError
from t5x_like.storage.streams import Region

FLOATS = ("float32", "bfloat16", "float16")
BLOCK_BYTES = 16 << 20  # of one piece; a conversion holds about four for each of its threads
_LAYER = "{layer}"
_STRIP = 16  # elements of a row that are copied at a time where dims change places


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs for each layer, or one in all, and the leaf or leaves of ours that it holds.

    equation: see layout.py; "" where the shapes are alike. sizes: of dims that ours joins.
    """

    name: str
    paths: str | tuple[str, ...]
    equation: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: what is in both. ignored: regexes of names that hold nothing learned (buffers of masks and angles).

    copies: name -> name of which it may be a copy, and is checked to be (heads that are tied to the embedding).
    written_copies: those of them that are written. prefix: what all names begin with, unless the base model alone was
    saved.
    """

    rows: Sequence[Row]
    ignored: Sequence[str] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    written_copies: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of ours: its shape with and without the padding of the vocabulary, and whether layers come first."""

    shape: tuple[int, ...]
    logical: tuple[int, ...]
    stacked: bool

    @property
    def layers(self) -> int:
        return self.shape[0] if self.stacked else 1


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one layer of a leaf lies: the name of their tensor, and how."""

    name: str
    layout: Layout


class Source(Protocol):
    """Tensors of theirs by name, read in pieces."""

    where: str  # in messages: a file or folder

    def described(self) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
        """name -> (shape, dtype)."""
        ...

    def read(self, name: str, span: Span, *, reuse: bool = False) -> np.ndarray:
        """The box of a tensor, in the shape of the box. reuse: it may lie where this thread's next read goes."""
        ...


class Target(Protocol):
    """Tensors of theirs by name, written in pieces."""

    def write(self, name: str, span: Span, array: np.ndarray) -> None: ...


class ModelMap:
    """A table for one model: the leaves of ours by path, and where each layer of each lies."""

    def __init__(self, table: Table, specs: Mapping[str, Any], *, vocab_size: int):
        """`specs`: path -> ParamSpec of our model. A table that does not fit them is a defect: ValueError."""
        self.table, self.specs = table, specs
        self.leaves = {path: _leaf(spec, vocab_size) for path, spec in specs.items()}
        self.tensors: dict[str, list[Tensor]] = {}
        for row in table.rows:
            paths = (row.paths,) if isinstance(row.paths, str) else row.paths
            for part, path in enumerate(paths):
                if path in self.tensors or path not in self.leaves:
                    raise ValueError(f"{row.name}: our {path!r} is covered twice or does not exist")
                self.tensors[path] = list(self._layers(row, path, part if len(paths) > 1 else None, len(paths)))
        left_out = sorted(self.leaves.keys() - self.tensors.keys())
        if left_out:
            raise ValueError(f"no row covers our {left_out[0]!r}")

    def _layers(self, row: Row, path: str, part: int | None, parts: int) -> Iterator[Tensor]:
        leaf = self.leaves[path]
        shape = leaf.logical[1:] if leaf.stacked else leaf.logical
        letters = " ".join(f"d{dim}" for dim in range(len(shape)))
        equation = row.equation or f"{letters} -> {letters}"
        layout = parse(equation, shape, parts=parts, part=part, sizes=row.sizes, where=row.name)
        if leaf.stacked != (_LAYER in row.name):
            raise ValueError(f"{row.name}: should hold {_LAYER} exactly where our leaf has layers")
        for layer in range(leaf.layers):
            yield Tensor(row.name.replace(_LAYER, str(layer)), layout)

    def described(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Their tensors in the order of the table, layer by layer: name -> (shape, one path of ours that it holds)."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for path, tensors in self.tensors.items():
            for tensor in tensors:
                found.setdefault(tensor.name, (tensor.layout.shape, path))
        return found

    def written(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """As `described`, with the copies that are written."""
        found = self.described()
        return found | {name: found[self.table.copies[name]] for name in self.table.written_copies}

    def chunk(self, path: str, itemsize: int) -> tuple[int, ...]:
        """The shape of the pieces, of at most BLOCK_BYTES, in which a leaf of ours is converted and stored.

        Of one layer, or of several whole ones.
        """
        leaf = self.leaves[path]
        piece = self.tensors[path][0].layout.chunk(itemsize, BLOCK_BYTES)
        if not leaf.stacked:
            return piece
        count = BLOCK_BYTES // (math.prod(leaf.shape[1:]) * itemsize)
        return (min(max(count, 1), leaf.layers), *piece)

    def summed(self, path: str) -> tuple[int, ...]:
        """The dims of our leaf that are the columns of their matrices [out, in]."""
        layout = self.tensors[path][0].layout
        first = 1 if self.leaves[path].stacked else 0
        return tuple(first + dim for dim, group in enumerate(layout.ours) if set(group) <= set(layout.theirs[1]))

    def cut(self, path: str, region: Region) -> Iterator[tuple[Tensor, tuple[int, ...], Region]]:
        """What a region of ours consists of: (their tensor, where in the region its layer begins, region of a layer).

        Rows that pad the vocabulary are left out.
        """
        leaf = self.leaves[path]
        inner, logical = (region[1:], leaf.logical[1:]) if leaf.stacked else (region, leaf.logical)
        kept = tuple((begin, min(end, size)) for (begin, end), size in zip(inner, logical, strict=True))
        if any(begin >= end for begin, end in kept):
            return
        if not leaf.stacked:
            yield self.tensors[path][0], (), kept
            return
        for layer in range(*region[0]):
            yield self.tensors[path][layer], (layer - region[0][0],), kept

    def write(self, target: Target, path: str, region: Region, array: np.ndarray) -> None:
        """Puts a region of our leaf into their tensors."""
        for tensor, index, kept in self.cut(path, region):
            piece = array[index][tuple(slice(end - begin) for begin, end in kept)]
            theirs = tensor.layout.to_theirs(piece, kept)
            copies = [name for name in self.table.written_copies if self.table.copies[name] == tensor.name]
            for name in (tensor.name, *copies):
                target.write(name, tensor.layout.span(kept), theirs)


class Reading:
    """A foreign model read through a mapping, after names, shapes and number formats of all tensors were checked.

    The dtype of a leaf is the one its tensors are stored in.
    """

    def __init__(self, mapping: ModelMap, source: Source):
        self._mapping, self._source = mapping, source
        given = source.described()
        self._names = _names(mapping.table, mapping.described(), given)
        self.dtypes = self._checked(given)

    def read(self, path: str, region: Region) -> np.ndarray:
        """A region of our leaf, in memory that this thread's next call overwrites.

        Raises UserError for a number that is not finite.
        """
        return self.gather(path, region, self.dtypes[path], self._read_finite)

    def gather(self, path: str, region: Region, dtype: Any, read: Callable[[str, Span], np.ndarray]) -> np.ndarray:
        """As `read`, of what `read(name, span)` gives of their tensors."""
        result = scratch.array("ours", [end - begin for begin, end in region], np.dtype(dtype))
        leaf = self._mapping.leaves[path]
        if leaf.shape != leaf.logical:
            result[...] = 0
        for tensor, index, kept in self._mapping.cut(path, region):
            piece = tensor.layout.to_ours(read(self._names[tensor.name], tensor.layout.span(kept)), kept)
            copy(piece, result[index][tuple(slice(end - begin) for begin, end in kept)])
        return result

    def names(self, path: str) -> list[str]:
        """Their tensors that hold a leaf."""
        return [self._names[tensor.name] for tensor in self._mapping.tensors[path]]

    def _read_finite(self, name: str, span: Span) -> np.ndarray:
        found = self._source.read(name, span, reuse=True)
        if not all_finite(found):
            raise UserError(f"{self._source.where}: {name!r} holds NaN or infinity; it is no trained model")
        return found

    def _checked(self, given: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.dtype]:
        where, wanted = self._source.where, self._mapping.described()
        for name, (shape, path) in wanted.items():
            found = given.get(self._names[name])
            if found is None:
                raise UserError(f"{where}: {self._names[name]!r} is missing (our {path}); the model is not whole")
            theirs = self._names[name]
            if found[0] != shape:
                raise UserError(
                    f"{where}: {theirs!r} has the shape {list(found[0])}, expected {list(shape)} by its config"
                )
            if found[1].name not in FLOATS:
                raise UserError(
                    f"{where}: {theirs!r} is stored as {found[1].name}; expected {', '.join(FLOATS)}: convert "
                    "the model that was not quantized"
                )
        for name in sorted(given.keys() - {self._names[name] for name in wanted}):
            self._admit(name, given)
        return {
            path: _one_dtype([given[self._names[tensor.name]][1] for tensor in tensors])
            for path, tensors in self._mapping.tensors.items()
        }

    def _admit(self, name: str, given: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """Accepts a tensor that no row covers: a buffer, or a copy of one that is covered."""
        table, where = self._mapping.table, self._source.where
        if any(re.fullmatch(pattern, name) for pattern in table.ignored):
            return
        original = table.copies.get(name)
        if original is None:
            raise UserError(f"{where}: {name!r} is unknown to this family; nothing of ours stands for it")
        original = self._names[original]
        if given[name] != given[original] or not self._alike(name, original, given[name][0]):
            raise UserError(
                f"{where}: {name!r} differs from {original!r} although config.json ties them; set tie_word_embeddings "
                "to false in config.json if the model has a head of its own"
            )

    def _alike(self, name: str, other: str, shape: tuple[int, ...]) -> bool:
        step = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
        for begin in range(0, shape[0], step):
            box = ((begin, min(begin + step, shape[0])), *((0, size) for size in shape[1:]))
            one, two = (self._source.read(each, Span(shape, box)) for each in (name, other))
            if one.tobytes() != two.tobytes():
                return False
        return True


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies, converting the dtype; in strips where the order of dims differs, which is two to three times as fast."""
    source, target = _joined(source, target)
    if source.ndim > 1 and abs(source.strides[-1]) != source.itemsize and source.size > 1 << 14:
        for begin in range(0, source.shape[-1], _STRIP):
            target[..., begin : begin + _STRIP] = source[..., begin : begin + _STRIP]
    else:
        target[...] = source


def _joined(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with every pair of neighbouring dims made one that is one to both."""
    dim = 0
    while dim + 1 < one.ndim:
        size = one.shape[dim + 1]
        if all(each.strides[dim] == each.strides[dim + 1] * size for each in (one, two)):
            shape = (*one.shape[:dim], one.shape[dim] * size, *one.shape[dim + 2 :])
            one, two = one.reshape(shape), two.reshape(shape)
        else:
            dim += 1
    return one, two


def all_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; by the bits, since numpy compares bfloat16 slowly."""
    if array.dtype.kind not in "fV" or not array.size:
        return True
    info = ml_dtypes.finfo(array.dtype)
    kind = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[info.bits]
    exponent = ((1 << info.nexp) - 1) << info.nmant
    bits = array.reshape(-1).view(kind)
    step = 1 << 16
    magnitude = np.array((1 << (info.bits - 1)) - 1, kind)
    return all(int((bits[i : i + step] & magnitude).max()) < exponent for i in range(0, bits.size, step))


def _leaf(spec: Any, vocab_size: int) -> Leaf:
    logical = tuple(vocab_size if axis == "vocab" else size for axis, size in zip(spec.axes, spec.shape, strict=True))
    return Leaf(tuple(spec.shape), logical, spec.axes[:1] == ("layers",))


def _names(table: Table, wanted: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """Name in the table -> name in the file: without the prefix where no name there has it."""
    bare = bool(table.prefix) and not any(name.startswith(table.prefix) for name in given)
    return {name: name.removeprefix(table.prefix) if bare else name for name in wanted}


def _one_dtype(found: Collection[np.dtype]) -> np.dtype:
    """The dtype of a leaf whose layers have these: float32, which holds all of them, where they differ."""
    return next(iter(found)) if len(set(found)) == 1 else np.dtype(np.float32)
