"""The form `compressed-tensors` of int8 weights (W8A16) in a Hugging Face folder, written and read.

Of each Linear module it holds `weight_packed`, int32 [out, in / 4]: four values a word, the first in the lowest byte,
each with 128 added; `weight_scale` [out, 1]; and `weight_shape`, int64 [2]. It is `pack-quantized`, the one form of
8-bit weights alone that vLLM takes; `int-quantized` (int8 `weight` and `weight_scale`) is read too. Nothing here needs
the package of that name (github.com/vllm-project/compressed-tensors, Apache-2.0), which reads what is written.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from t5x_like.convert.layout import Span
from t5x_like.convert.mapping import ModelMap, Target
from t5x_like.core.errors import UserError
from t5x_like.storage.streams import Region

PACKED, INTEGERS = "pack-quantized", ("int-quantized", "naive-quantized")
# Families whose matrices are Linear modules in transformers, as we have tested.
FAMILIES = ("llama",)
_OFFSET = 0x80  # added to a value modulo 256
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_PARTS = ("_packed", "_scale", "_shape")  # behind the name of a weight

Quantize = Callable[[np.ndarray, tuple[int, ...], np.dtype], tuple[np.ndarray, np.ndarray]]


def settings() -> dict[str, Any]:
    """The field `quantization_config` of a config.json: all Linear modules but the head."""
    weights = _WEIGHTS | {
        **dict.fromkeys(("group_size", "block_structure", "actorder")),
        **{"dynamic": False, "observer": "minmax", "observer_kwargs": {}},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the leaves of a model are written. dims: path -> the dims that a product sums, of those that are packed.

    quantize(w, dims, scale_dtype): (int8 values, scales). scale_dtype: that of the other tensors, in which a reader
    holds scales.
    """

    dims: Mapping[str, tuple[int, ...]]
    quantize: Quantize
    scale_dtype: np.dtype

    def described(
        self, tensors: Mapping[str, tuple[tuple[int, ...], str]], dtypes: Mapping[str, np.dtype]
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The tensors of a folder, from those that it would hold unpacked, name -> (shape, path of ours)."""
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name, (shape, path) in tensors.items():
            if path not in self.dims:
                found[name] = shape, dtypes[path]
                continue
            out, size = shape
            found |= {
                f"{name}_packed": ((out, _words(size)), np.dtype(np.int32)),
                f"{name}_scale": ((out, 1), self.scale_dtype),
                f"{name}_shape": ((2,), np.dtype(np.int64)),
            }
        return found

    def chunk(self, path: str, shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
        """The shape of the pieces in which a leaf is written: of whole channels."""
        dims = self.dims.get(path, ())
        return tuple(size if dim in dims else piece for dim, (piece, size) in enumerate(zip(chunk, shape, strict=True)))

    def write(self, mapping: ModelMap, target: Target, path: str, region: Region, array: np.ndarray) -> None:
        """Puts a region of whole channels of our leaf into their tensors."""
        values, scale = self.quantize(array, self.dims[path], self.scale_dtype)
        for tensor, index, kept in mapping.cut(path, region):
            layout = tensor.layout
            rows = _Rows.of(layout.span(kept), layout.shape)
            theirs = layout.to_theirs(values[index], kept).reshape(rows.count, -1)
            scales = layout.to_theirs(np.broadcast_to(scale, values.shape)[index], kept).reshape(rows.count, -1)
            packed = np.zeros((rows.count, 4 * _words(rows.length)), np.uint8)
            np.bitwise_xor(theirs.view(np.uint8), _OFFSET, out=packed[:, : rows.length])
            target.write(f"{tensor.name}_packed", rows.span(_words(rows.length)), packed.view(np.int32))
            target.write(f"{tensor.name}_scale", rows.span(1), np.ascontiguousarray(scales[:, :1]))
            target.write(f"{tensor.name}_shape", Span((2,), ((0, 2),)), np.array(layout.shape, np.int64))


class Bytes(Protocol):
    """Tensors by name that can also be read as bytes."""

    where: str

    def described(self) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]: ...
    def read(self, name: str, span: Span, *, reuse: bool = False, dtype: Any = None) -> np.ndarray: ...


class PackedTensors:
    """The tensors of a folder with those that are packed as plain ones, in the type of their scales: a mapping.Source.

    `values` and `scales` give what such a tensor is made of.
    """

    def __init__(self, tensors: Bytes):
        self.where, self._tensors = tensors.where, tensors
        given = dict(tensors.described())
        self._sizes: dict[str, tuple[int, int]] = {}  # of packed weights
        for name in [name.removesuffix("_scale") for name in given if name.endswith(".weight_scale")]:
            self._sizes[name] = self._size(name, given)
        hidden = {name + part for name in self._sizes for part in _PARTS}
        self._described = {name: value for name, value in given.items() if name not in hidden} | {
            name: (size, given[f"{name}_scale"][1]) for name, size in self._sizes.items()
        }

    def described(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return self._described

    def is_packed(self, name: str) -> bool:
        return name in self._sizes

    def read(self, name: str, span: Span, *, reuse: bool = False) -> np.ndarray:
        if name not in self._sizes:
            return self._tensors.read(name, span, reuse=reuse)
        scales = self.scales(name, span)
        return (self.values(name, span).astype(np.float32) * scales.astype(np.float32)).astype(scales.dtype)

    def values(self, name: str, span: Span) -> np.ndarray:
        """The int8 values of a box."""
        rows = _Rows.of(span, self._sizes[name])
        if f"{name}_packed" in self._tensors.described():
            size = 4 * _words(rows.length)
            found = self._tensors.read(f"{name}_packed", rows.span(size), reuse=True, dtype=np.uint8)
            found = np.bitwise_xor(found.reshape(rows.count, size)[:, : rows.length], _OFFSET).view(np.int8)
        else:
            found = self._tensors.read(name, rows.span(rows.length), reuse=True)
        return rows.box(found)

    def scales(self, name: str, span: Span) -> np.ndarray:
        """The scale of each element of a box."""
        rows = _Rows.of(span, self._sizes[name])
        found = self._tensors.read(f"{name}_scale", rows.span(1), reuse=False).reshape(rows.count, 1)
        if not np.isfinite(found.astype(np.float32)).all():
            raise UserError(f"{self.where}: {name + '_scale'!r} holds NaN or infinity; it is no trained model")
        return rows.box(np.broadcast_to(found, (rows.count, rows.length)))

    def _size(self, name: str, given: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[int, int]:
        """[out, in] of a packed weight, after its parts were checked."""
        scale, packed, plain = (given.get(name + part, ((), None)) for part in ("_scale", "_packed", ""))
        size = plain[0]
        if packed[1] is not None:
            if f"{name}_shape" not in given or given[f"{name}_shape"][0] != (2,):
                raise UserError(f"{self.where}: {name + '_shape'!r} is missing or no pair; the model is not whole")
            size = tuple(int(n) for n in self._tensors.read(f"{name}_shape", Span((2,), ((0, 2),))))
        expected = (size[0], _words(size[1])) if packed[1] is not None and len(size) == 2 else size
        found = packed if packed[1] is not None else plain
        kind = np.int32 if packed[1] is not None else np.int8
        if len(size) != 2 or found != (expected, kind) or scale[0] != (size[0], 1) or min(size) < 1:
            raise UserError(
                f"{self.where}: {name!r} of the shape {list(size)} has parts {list(found[0])} {found[1]} and "
                f"{list(scale[0])}; expected 8-bit values with one scale a row"
            )
        return size[0], size[1]


def check(found: Any, *, where: str) -> None:
    """Raises UserError for a `quantization_config` that is none of those that are read here."""
    groups = found.get("config_groups") if isinstance(found, Mapping) else None
    parts = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [part.get("weights") if isinstance(part, Mapping) else None for part in parts]
    read = (
        bool(parts)
        and found.get("quant_method") == "compressed-tensors"
        and found.get("format") in (PACKED, *INTEGERS)
        and all(isinstance(w, Mapping) and all(w.get(key) == value for key, value in _WEIGHTS.items()) for w in weights)
        and not any(part.get("input_activations") or part.get("output_activations") for part in parts)
        and not found.get("kv_cache_scheme")
    )
    if not read:
        raise UserError(
            f"{where}: quantization_config is set to what is not read here; expected compressed-tensors with 8-bit "
            "integer weights, one scale a channel, and no quantized activations: convert the model that was not "
            "quantized"
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A box of a weight [out, in] whose dims may be several of ours: whole rows that hold it, and where in them.

    sizes, inside: the dims of `out` and their box; length: elements of a row; rest: dims of `in` and their box.
    """

    sizes: tuple[int, ...]
    inside: Region
    rest: tuple[int, ...]
    rest_box: Region

    @classmethod
    def of(cls, span: Span, shape: Sequence[int]) -> "_Rows":
        dims = next(n for n in range(1, len(span.sizes)) if math.prod(span.sizes[:n]) == shape[0])
        return cls(span.sizes[:dims], span.box[:dims], span.sizes[dims:], span.box[dims:])

    @property
    def count(self) -> int:
        return math.prod(end - begin for begin, end in self.inside)

    @property
    def length(self) -> int:
        return math.prod(self.rest)

    def span(self, size: int) -> Span:
        """These rows in an array of `size` elements a row."""
        return Span((*self.sizes, size), (*self.inside, (0, size)))

    def box(self, rows: np.ndarray) -> np.ndarray:
        """The box out of whole rows [count, length]."""
        shape = [end - begin for begin, end in self.inside]
        return rows.reshape(*shape, *self.rest)[(..., *(slice(*span) for span in self.rest_box))]


def _words(size: int) -> int:
    return -(-size // 4)
