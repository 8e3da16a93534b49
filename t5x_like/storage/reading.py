"""Reads one checkpoint, a folder with items and metadata, onto any mesh, and verifies every array. Writes nothing.

Works on the path of the checkpoint alone, so that a model directory needs no manager. All processes of a run call these
functions together.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from t5x_like.core import tree
from t5x_like.core.errors import UserError
from t5x_like.storage import fingerprint, leaves, paths, streams
from t5x_like.storage.fingerprint import fingerprints
from t5x_like.storage.model_directory import DamagedCheckpoint, read_metadata
from t5x_like.storage.quiet import quiet_orbax

# Such errors say nothing about the bytes of the checkpoint: it must not be put aside for them.
_NOT_DAMAGE = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


GROUP_BYTES = 2**30  # read at once, over all devices: fewer are slower only for many small arrays

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def restore(
    checkpoint: str,
    templates: Mapping[str, Any],
    *,
    kinds: Mapping[str, leaves.Constructor] | None = None,
    place: Place | None = None,
    group_bytes: int = GROUP_BYTES,
) -> dict[str, Any]:
    """The items named in `templates`: trees of jax.ShapeDtypeStruct, each leaf with the sharding it shall have.

    A template may hold part of an item, and leaves.Built, which make their leaves themselves. A leaf without a sharding
    goes to the first device; one of another dtype than saved is converted after it was verified. At most `group_bytes`
    (or one array) are read before they are verified and converted, so that in all there is little more than the result.

    Where the checkpoint recorded a leaf of another kind (quantized, low-rank) for a plain template, the leaf is built
    of its parts by the constructors `kinds`, in the dtypes that were saved; `place(path, shape)` says where each part
    lies. Raises UserError for an item, path, shape or kind that is not there or not known, DamagedCheckpoint if it
    cannot be read or a fingerprint differs.
    """
    note = read_metadata(checkpoint)
    result = {}
    for name, template in templates.items():
        recorded = note["arrays"].get(name)
        if recorded is None:
            raise UserError(f"{checkpoint} holds no {name!r}; it has {', '.join(sorted(note['arrays']))}")
        where = f"{checkpoint}/{name}"
        template = _with_kinds(
            template, recorded, note["kinds"].get(name, {}), kinds or {}, place or _anywhere, where=where
        )
        wanted = leaves.array_paths(template)
        check_templates(wanted, recorded, where=where)
        built = {path: leaf for path, leaf in wanted.items() if isinstance(leaf, leaves.Built)}
        arrays = _build(checkpoint, name, built, note["fingerprints"][name]) if built else {}
        for group in _groups(recorded, [path for path in wanted if path not in built], group_bytes):
            read = _read(checkpoint, name, {path: wanted[path] for path in group}, recorded)
            _verify(checkpoint, name, read, note["fingerprints"][name])
            converted = {path: _as_dtype(array, wanted[path].dtype) for path, array in read.items()}
            del read
            arrays |= jax.block_until_ready(converted)  # what was read is freed before the next group comes
        result[name] = leaves.rebuild(template, arrays)
    return result


def _anywhere(path: str, shape: tuple[int, ...]) -> None:
    return None


def _groups(recorded: Mapping[str, Mapping[str, Any]], wanted: Iterable[str], limit: int) -> Iterator[list[str]]:
    """The paths in order, in groups of at most `limit` bytes as saved; a larger array is a group of its own."""
    group: list[str] = []
    total = 0
    for path in wanted:
        size = math.prod(recorded[path]["shape"]) * np.dtype(recorded[path]["dtype"]).itemsize
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(path)
        total += size
    if group:
        yield group


def _build(
    checkpoint: str, name: str, templates: Mapping[str, leaves.Built], recorded: Mapping[str, int]
) -> dict[str, Any]:
    """The leaves of templates that make them themselves, each verified when it is whole."""
    streams.free_pieces_at_once()
    readers, result = streams.read_item(checkpoint, name), {}
    for path, template in templates.items():
        reader, total = readers[path], 0
        buffer = np.empty(0, reader.dtype)

        def read(region: streams.Region, reader: streams.LeafReader = reader) -> np.ndarray:
            nonlocal total, buffer
            if buffer.size < streams.size(region):
                buffer = np.empty(streams.size(region), reader.dtype)
            piece = buffer[: streams.size(region)].reshape([end - begin for begin, end in region])
            reader.read_into(piece, region)
            total += fingerprint.part(piece, [begin for begin, _ in region], reader.shape)
            return piece

        result[path] = template.build(read, reader.chunk)
        if total % 2**32 != recorded.get(path):
            raise _differs(checkpoint, name, [path])
    return result


def _with_kinds(
    template: Any,
    recorded: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Mapping[str, Any]],
    constructors: Mapping[str, leaves.Constructor],
    place: Place,
    *,
    where: str,
) -> Any:
    """`template` with those of its plain leaves that were saved as another kind replaced by abstract ones of it."""
    found = {path: leaf for path, leaf in leaves.array_paths(template).items() if path in records}
    if not found:
        return template
    check_templates(found, records, where=where)
    parts = {path: record for path, record in recorded.items() if path.startswith(tuple(f"{name}/" for name in found))}
    built = leaves.templates(parts, {path: records[path] for path in found}, constructors, sharding=place, where=where)
    return tree.map_with_path(lambda path, leaf: tree.flatten(built).get(path, leaf), template)


def _read(
    checkpoint: str, name: str, wanted: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]]
) -> dict[str, jax.Array]:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = tree.unflatten(
        {
            path: jax.ShapeDtypeStruct(
                leaf.shape, np.dtype(recorded[path]["dtype"]), sharding=getattr(leaf, "sharding", None) or default
            )
            for path, leaf in wanted.items()
        }
    )
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    arrays, error = {}, None
    quiet_orbax()
    try:
        # The handler itself, not a Checkpointer: that one ends in a barrier, where the others would wait for a
        # process whose part of the data is damaged.
        arrays = tree.flatten(
            ocp.PyTreeCheckpointHandler().restore(epath.Path(paths.join(checkpoint, name)), args=arguments)
        )
    except Exception as caught:  # Orbax raises anything, plain Exception included, for bytes it cannot decode
        error = caught.__cause__ or caught
        if isinstance(error, PermissionError) or any(mark in str(error) for mark in _NOT_DAMAGE):
            raise UserError(f"{paths.join(checkpoint, name)} cannot be read ({one_line(error)})") from None
    # A flipped bit in its description of the tree makes Orbax skip a leaf and hand back the template.
    if error is None and not all(isinstance(arrays.get(path), jax.Array) for path in wanted):
        error = ValueError("some arrays are missing")
    if not all(_gathered(error is None)):
        reason = one_line(error) if error is not None else "another process could not read its part"
        raise DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {name!r} cannot be read ({reason})")
    return arrays


def _verify(checkpoint: str, name: str, arrays: Mapping[str, jax.Array], recorded: Mapping[str, int]) -> None:
    now = fingerprints(arrays)
    wrong = [path for path in now if now[path] != recorded.get(path)]
    if wrong:
        raise _differs(checkpoint, name, wrong)


def _differs(checkpoint: str, name: str, wrong: Sequence[str]) -> DamagedCheckpoint:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return DamagedCheckpoint(f"checkpoint {checkpoint} is damaged: {name}/{wrong[0]}{more} differs from what was saved")


def check_templates(wanted: Mapping[str, Any], recorded: Mapping[str, Mapping[str, Any]], *, where: str) -> None:
    """Raises UserError, naming paths and shapes, unless every wanted array was recorded with that shape."""
    missing = [path for path in wanted if path not in recorded]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where} has no {missing[0]!r}{more}; it belongs to another model or optimizer")
    other = [path for path, leaf in wanted.items() if list(leaf.shape) != list(recorded[path]["shape"])]
    if other:
        differing = ", ".join(
            f"{path!r} is {list(recorded[path]['shape'])} there and {list(wanted[path].shape)} here"
            for path in other[:3]
        )
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(f"{where} has other shapes: {differing}{more}; use the config it was made with")


def one_line(error: BaseException) -> str:
    """Beginning and end of a long message: TensorStore puts the reason behind several paths, and source lines last."""
    text = " ".join(str(error).partition("[source locations=")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-180:]}"


def _as_dtype(array: jax.Array, dtype: Any) -> jax.Array:
    return array if array.dtype == dtype else array.astype(dtype)


def _gathered(value: bool) -> list[bool]:
    """The value of every process, on every process."""
    if jax.process_count() == 1:
        return [value]
    return [bool(other) for other in np.ravel(multihost_utils.process_allgather(np.array(value)))]
