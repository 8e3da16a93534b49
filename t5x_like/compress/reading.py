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

    def build(self, read: Callable[[Region], np.ndarray], chunk: Sequence[int], /) -> QuantArray:
        scale_shape = tuple(1 if dim in self.dims else size for dim, size in enumerate(self.shape))
        values, scale = np.empty(self.shape, np.int8), np.empty(scale_shape, np.float32)
        for region in chunks(self.shape, whole(chunk, self.shape, self.dims)):
            where = tuple(slice(*span) for span in region)
            channels = tuple(slice(0, 1) if dim in self.dims else span for dim, span in enumerate(where))
            values[where], scale[channels] = quantized(read(region), self.dims)
        if not np.isfinite(scale).all():
            raise UserError(f"{self.path!r} holds NaN or infinity; take an earlier checkpoint")
        return placed(self.path, values, scale, self.axes, self.place)


def placed(path: str, values: np.ndarray, scale: np.ndarray, axes: Axes, place: Place) -> QuantArray:
    """A leaf whose parts lie where `place(path of the part, shape)` says."""
    arrays = []
    for name, part in (("values", values), ("scale", scale)):
        sharding = place(f"{path}/{name}", part.shape)
        arrays.append(jax.device_put(part, jax.local_devices()[0] if sharding is None else sharding))
    return QuantArray(arrays[0], arrays[1], axes)


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
