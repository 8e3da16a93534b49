"""Quantizes weights while they are read, a piece of a float leaf at a time: little more than its int8 is held."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from t5x_like.compress import choice
from t5x_like.compress.quant_array import QuantArray, quantized
from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.core.types import Axes, Tree
from t5x_like.storage.reading import Place
from t5x_like.storage.streams import Region, chunks

_BYTES = 1 << 20  # of float32 that are quantized at a time: the passes over them stay in a core's cache


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The template of an int8 leaf (storage.leaves.Built), whatever float type it is stored in.

    dims: those that a product sums. place(path, shape): where a part shall lie, None for the first device.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    dims: tuple[int, ...]
    place: Place

    def build(self, read: Callable[[Region], np.ndarray], chunk: Sequence[int]) -> QuantArray:
        """The leaf from pieces that `read` gives, one after the other; chunk: the shape in which it is stored."""
        scale_shape = tuple(1 if dim in self.dims else size for dim, size in enumerate(self.shape))
        values, scale = np.empty(self.shape, np.int8), np.empty(scale_shape, np.float32)
        for region in chunks(self.shape, whole(chunk, self.shape, self.dims)):
            piece = read(region)
            for part in chunks(piece.shape, self._part(piece.shape)):
                found = quantized(piece[tuple(slice(*span) for span in part)], self.dims)
                target = tuple(slice(b + low, b + high) for (b, _), (low, high) in zip(region, part, strict=True))
                values[target] = found[0]
                scale[tuple(slice(0, 1) if dim in self.dims else span for dim, span in enumerate(target))] = found[1]
        if not np.isfinite(scale).all():
            raise UserError(f"{self.path!r} holds NaN or infinity; take an earlier checkpoint")
        return QuantArray(*(self._put(name, part) for name, part in (("values", values), ("scale", scale))), self.axes)

    def _part(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is quantized at a time: whole channels, as many as are `_BYTES` large."""
        size = 4 * int(np.prod([shape[dim] for dim in self.dims]))
        part = list(shape)
        for dim in range(len(shape)):
            if dim not in self.dims:
                rest = size * int(np.prod([part[d] for d in range(dim + 1, len(shape)) if d not in self.dims]))
                part[dim] = max(1, min(part[dim], _BYTES // max(rest, 1)))
        return tuple(part)

    def _put(self, name: str, array: np.ndarray) -> jax.Array:
        sharding = self.place(f"{self.path}/{name}", array.shape)
        return jax.device_put(array, jax.local_devices()[0] if sharding is None else sharding)


def whole(chunk: Sequence[int], shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    """A chunk made as large as the leaf in the dims that are summed."""
    return tuple(size if dim in dims else piece for dim, (piece, size) in enumerate(zip(chunk, shape, strict=True)))


def templates(specs: Tree, wanted: Tree, place: Place) -> dict[str, object]:
    """The templates `wanted` of a model with those of the weights that become int8 replaced."""
    dims, flat = choice.dims(specs), tree.flatten(specs)

    def template(path: str, plain: object) -> object:
        if path not in dims:
            return plain
        return Quantized(path, tuple(flat[path].shape), flat[path].axes, dims[path], place)

    return tree.map_with_path(template, wanted)
