"""Any tree of arrays as nested dicts of plain arrays, and back. This is all that the checkpoint format sees of a tree.

A path joins keys, attribute names and indices with `/`: an optax state's second moment of `layers/up` may be
`1/nu/layers/up`. A leaf that is no array (quantized, low-rank) has `kind`, `shape` and `axes` and becomes its parts, as
`layers/up/values` and `layers/up/scales`; a record of its kind is kept, from which a table of constructors given by
the caller builds it again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from t5x_like.core import tree
from t5x_like.core.errors import UserError

# From the abstract parts by name, the logical shape and the axes, an abstract leaf (a pytree of the parts).
Constructor = Callable[[dict[str, jax.ShapeDtypeStruct], tuple[int, ...], tuple[str | None, ...]], Any]


@runtime_checkable
class Built(Protocol):
    """A template that makes its leaf itself of the array that is stored, read a region at a time.

    build(read, chunk): `read(region)` gives a numpy array, which the next call may overwrite; every region is asked for
    once. chunk: the shape of the pieces in which the array is stored.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    def build(self, read: Callable[[Any], np.ndarray], chunk: Sequence[int], /) -> Any: ...


def array_paths(item: Any) -> dict[str, Any]:
    """Path -> array (or abstract array) of any pytree, in the order of its leaves; a lone one has the path `value`."""
    flat = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(item)[0]:
        path = "/".join(_name(key) for key in keys) or "value"
        if path in flat:
            raise ValueError(f"two leaves have the path {path!r}")
        flat[path] = leaf
    return flat


def rebuild(template: Any, arrays: Mapping[str, Any]) -> Any:
    """The tree of `template` with its leaves taken from `arrays` by path."""
    structure = jax.tree_util.tree_structure(template)
    return jax.tree_util.tree_unflatten(structure, [arrays[path] for path in array_paths(template)])


def kinds(item: Any) -> dict[str, dict[str, Any]]:
    """A record {kind, shape, axes} of each leaf that is no plain array, by path."""
    found = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(item, is_leaf=_is_special)[0]:
        if _is_special(leaf):
            path = "/".join(_name(key) for key in keys) or "value"
            found[path] = {"kind": leaf.kind, "shape": list(leaf.shape), "axes": list(leaf.axes)}
    return found


def templates(
    arrays: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, Mapping[str, Any]],
    constructors: Mapping[str, Constructor],
    *,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None],
    where: str,
) -> dict[str, Any]:
    """A nested dict of abstract leaves from what a checkpoint recorded about them.

    `arrays` is path -> {shape, dtype}, `sharding(path, shape)` says where each array shall lie. Raises UserError,
    naming `where`, for a kind that is not in `constructors`.
    """
    abstract = {
        path: jax.ShapeDtypeStruct(
            tuple(record["shape"]), np.dtype(record["dtype"]), sharding=sharding(path, tuple(record["shape"]))
        )
        for path, record in arrays.items()
    }
    for path, record in kinds.items():
        kind = record["kind"]
        if kind not in constructors:
            known = ", ".join(["array", *sorted(constructors)])
            raise UserError(
                f"{where}: {path!r} is of the kind {kind!r}, which this program does not know; known: {known}"
            )
        prefix = f"{path}/"
        parts = {name[len(prefix) :]: abstract.pop(name) for name in list(abstract) if name.startswith(prefix)}
        abstract[path] = constructors[kind](parts, tuple(record["shape"]), tuple(record["axes"]))
    return tree.unflatten(abstract)


def _is_special(leaf: Any) -> bool:
    return hasattr(leaf, "kind") and hasattr(leaf, "axes") and hasattr(leaf, "shape")


def _name(key: Any) -> str:
    match key:
        case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
            text = str(name)
        case jax.tree_util.SequenceKey(idx=index):
            text = str(index)
        case jax.tree_util.GetAttrKey(name=name):
            text = str(name)
        case _:
            raise ValueError(f"a key of the type {type(key).__name__} has no name")
    # Orbax joins names with dots: two different trees must not get one name.
    if not text or "/" in text or "." in text:
        raise ValueError(f"{text!r} is no name for a part of a saved tree: it is empty or holds '/' or '.'")
    return text
