"""The space of a search: its dimensions, and the points that they make. A point is a dict of overrides of a config.

    mesh           sizes of the axes of the mesh, all ways to divide the devices
    rules          "" for those of the config, "spread" for parameters over all axes of the batch and of rows
    remat          policies, points and shares of layers (layers/remat.py)
    micro_batches  parts of a batch
    scan           layers in a loop, or one by one
    blocks         queries and keys of a block of the attention kernels
    config.FIELD   any other field

All here is pure: the same config and flags give the same points with the same names.
"""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.layers import remat as remats
from t5x_like.layers.attention import kernels
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.rules import MESH_AXES, PRESETS

FLAG = "--search."
DIMENSIONS = ("mesh", "rules", "remat", "micro_batches", "scan", "blocks")
AXES = ("data", "fsdp", "sequence", "tensor")  # that are searched unless somebody says otherwise
MICRO_BATCHES = (1, 2, 4)
BLOCKS = (512, 2048)  # beside the config's own, where they divide a row
# All policies, two of which the last half of the layers saves more, and one that keeps attention's part on the host.
REMAT = (*remats.POLICIES, "products:0.5,context", "minimal:0.5,full", "q@host+k@host+v@host+context@host")
SPREAD = "spread"
_SPREAD_AXES = ("data", "fsdp", "sequence")
_FIELDS = {
    "rules": "config.mesh.rules",
    "remat": "config.model.remat",
    "micro_batches": "config.loop.micro_batches",
    "scan": "config.model.scan",
    "blocks": "config.model.attention_block",
}
_MESH_FIELDS = tuple(f"config.mesh.{field}" for field in ("preset", *MESH_AXES))
# The dimension that a field belongs to.
_DIMENSION_OF = {path: name for name, path in _FIELDS.items()} | dict.fromkeys(_MESH_FIELDS, "mesh")
_OPTIONS = "config.runtime.compiler_options."


@dataclasses.dataclass(frozen=True)
class Point:
    """overrides: {"config.mesh.fsdp": 32}; none for the config as it is."""

    name: str
    overrides: Mapping[str, Any]

    @property
    def flags(self) -> list[str]:
        """The arguments that stand for the point; none holds a blank, so that `$(cat best.flags)` gives them back."""
        return [f"--{path}={_text(value)}" for path, value in self.overrides.items()]

    @property
    def mesh(self) -> tuple[tuple[str, Any], ...]:
        """What it says of the mesh and its rules: equal for points on one mesh."""
        return tuple(item for item in self.overrides.items() if item[0].startswith("config.mesh."))


@dataclasses.dataclass(frozen=True)
class Base:
    """What a config says already. shape: sizes of its mesh on the devices, {} where it does not fit them. said: the
    fields that somebody has set on the command line, which a search leaves alone. lengths: tokens of rows that the
    attention kernels may serve."""

    mesh: meshes.MeshConfig
    shape: Mapping[str, int]
    remat: str
    micro_batches: int
    scan: bool
    said: frozenset[str] = frozenset()
    attention_block: int = kernels.BLOCK
    lengths: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Space:
    """What is searched. fields: {path: values as flags give them}."""

    axes: tuple[str, ...]
    rules: tuple[str, ...]
    remat: tuple[str, ...]
    micro_batches: tuple[int, ...]
    scan: tuple[bool, ...]
    blocks: tuple[int, ...]
    fields: Mapping[str, tuple[str, ...]]

    @property
    def sets_compiler_options(self) -> bool:
        return any(path.startswith(_OPTIONS) for path in self.fields)


def read(flags: Sequence[str], base: Base, *, idle: Iterable[str] = ()) -> Space:
    """The space that `--search.DIMENSION=VALUES` flags describe, around a config. UsageError for what is wrong.

    idle: mesh axes on which no rule places anything. Values are separated by commas, those of rules and remat by
    semicolons, since they may hold commas; so are those of another field whose text has a semicolon.
    """
    given: dict[str, tuple[str, ...]] = {}
    for flag in flags:
        name, equals, text = flag.removeprefix(FLAG).partition("=")
        if name not in DIMENSIONS and not name.startswith("config."):
            hint = nearest(name, [*DIMENSIONS, "config.FIELD"])
            raise UsageError(f"{flag}: there is no dimension {name!r} of a search; {hint}")
        dimension = _DIMENSION_OF.get(name)
        if dimension is not None:
            raise UsageError(f"{flag}: this field is a dimension of its own; use {FLAG}{dimension}=...")
        if not equals or name in given:
            raise UsageError(f"{flag}: give each dimension once, as {FLAG}{name}=VALUE,VALUE")
        by = ";" if name in ("rules", "remat") or (";" in text and name.startswith("config.")) else ","
        values = [each.strip() for each in text.split(by)]
        if name.startswith("config.") and any(re.search(r"\s", each) for each in values):
            raise UsageError(f"{flag}: a value with blanks would be cut at them in best.flags; write it without")
        given[name] = tuple(dict.fromkeys(each for each in values if each or name == "rules"))
        if not given[name]:
            raise UsageError(f"{flag}: the space is empty; give at least one value")
    _refuse_said(given, base)
    axes = given.pop("mesh", tuple(axis for axis in AXES if axis not in set(idle)))
    for axis in axes:
        if axis not in MESH_AXES or axis == "slice":
            hint = nearest(axis, [name for name in MESH_AXES if name != "slice"])
            raise UsageError(f"{FLAG}mesh: {axis!r} is no axis of a mesh that can be chosen; {hint}")
    remat = given.pop("remat", (base.remat,) if "config.model.remat" in base.said else REMAT)
    for policy in remat:
        remats.parse(policy, path=f"{FLAG}remat")
    return Space(
        axes=axes,
        rules=given.pop("rules", ("",) if "config.mesh.rules" in base.said else ("", SPREAD)),
        remat=remat,
        micro_batches=_micro_batches(given.pop("micro_batches", None), base),
        scan=_truths(given.pop("scan", None), base),
        blocks=_blocks(given.pop("blocks", None), base),
        fields=given,
    )


def _refuse_said(given: Mapping[str, Any], base: Base) -> None:
    """A field is searched or set, not both: two values of one override would contradict each other."""
    for name in given:
        path = _FIELDS.get(name, name)
        said = [field for field in sorted(base.said) if field == path]
        if name == "mesh":
            said = [field for field in sorted(base.said) if field in _MESH_FIELDS]
        if said:
            raise UsageError(f"{FLAG}{name} searches what --{said[0]} sets; leave one of them out")


def _micro_batches(given: tuple[str, ...] | None, base: Base) -> tuple[int, ...]:
    if given is None:
        usual = () if _FIELDS["micro_batches"] in base.said else MICRO_BATCHES
        return tuple(sorted({base.micro_batches, *usual}))
    return _numbers("micro_batches", given)


def _blocks(given: tuple[str, ...] | None, base: Base) -> tuple[int, ...]:
    if given is None:
        usual = () if _FIELDS["blocks"] in base.said else BLOCKS
        divide = {block for block in usual if any(length % block == 0 for length in base.lengths)}
        return tuple(sorted({base.attention_block, *divide}))
    return _numbers("blocks", given, multiple=kernels.LANES)


def _numbers(name: str, given: tuple[str, ...], *, multiple: int = 1) -> tuple[int, ...]:
    for text in given:
        if not re.fullmatch("[1-9][0-9]{0,8}", text) or int(text) % multiple:
            what = f"a multiple of {multiple}" if multiple > 1 else "a number from 1"
            raise UsageError(f"{FLAG}{name}: {text!r} should be {what}")
    return tuple(int(text) for text in given)


def _truths(given: tuple[str, ...] | None, base: Base) -> tuple[bool, ...]:
    known = {"true": True, "false": False}
    for text in given or ():
        if text.lower() not in known:
            raise UsageError(f"{FLAG}scan: {text!r} should be True or False")
    return (base.scan,) if given is None else tuple(known[text.lower()] for text in given)


# Points.


def points(space: Space, base: Base, devices: int, *, slices: int = 1) -> Iterator[Point]:
    """All points, each once. devices: over all slices."""
    seen: dict[str, Mapping[str, Any]] = {}
    settled = base.said & set(_MESH_FIELDS)
    for shape in [base.shape] if settled else shapes(devices, space.axes, slices=slices):
        for rules in space.rules:
            placed = _placed(shape, rules, base, settled=bool(settled))
            if placed is None:
                continue
            rest = (space.remat, space.micro_batches, space.scan, space.blocks, _fields(space.fields))
            for remat, parts, scan, block, fields in itertools.product(*rest):
                overrides = dict(placed)
                for name, value, usual in (
                    ("remat", remat, base.remat),
                    ("micro_batches", parts, base.micro_batches),
                    ("scan", scan, base.scan),
                    ("blocks", block, base.attention_block),
                ):
                    if value != usual:
                        overrides[_FIELDS[name]] = value
                overrides |= fields
                words = [_mesh_name(shape), _plain(rules), remat, f"mb{parts}" if parts > 1 else ""]
                words += ["" if scan else "unrolled", f"blocks{block}" if block != base.attention_block else ""]
                words += [*(_field_name(*each) for each in fields.items())]
                name = "-".join(word for word in words if word)
                if seen.get(name, overrides) != overrides:  # names leave out signs: -1 and 1 have one
                    name += f"-{_mark(overrides)}"
                if name not in seen:
                    seen[name] = overrides
                    yield Point(name, overrides)


def shapes(devices: int, axes: Sequence[str], *, slices: int = 1) -> list[dict[str, int]]:
    """All meshes of these axes over the devices, {axis: size} of all axes in mesh order.

    >>> [{axis: size for axis, size in shape.items() if size > 1} for shape in shapes(4, ("fsdp", "tensor"))]
    [{'tensor': 4}, {'fsdp': 2, 'tensor': 2}, {'fsdp': 4}]
    """
    ordered = [axis for axis in MESH_AXES if axis in axes]
    inner = devices // slices
    found = []
    sizes = [size for size in range(1, inner + 1) if inner % size == 0]
    for chosen in itertools.product(sizes, repeat=len(ordered)):
        if math.prod(chosen) == inner:
            shape = dict.fromkeys(MESH_AXES, 1) | dict(zip(ordered, chosen, strict=True))
            found.append(shape | {"slice": slices})
    return found


def _placed(shape: Mapping[str, int], rules: str, base: Base, *, settled: bool) -> dict[str, Any] | None:
    """Overrides for a mesh and its rules; None where the rules would be those that the config has. settled: the mesh is
    that of the config."""
    wanted: dict[str, int] = dict(shape)
    # One axis takes what is there, so that a run goes on when devices go: fsdp, or data where that is whole.
    opened = next((axis for axis in ("fsdp", "data") if wanted[axis] > 1), None)
    if opened is not None:
        wanted[opened] = -1
    usual = PRESETS[base.mesh.preset]
    overrides: dict[str, Any] = {}
    for axis in () if settled else MESH_AXES:
        own = getattr(base.mesh, axis)
        if wanted[axis] != (usual.get(axis, 1) if own is None else own):
            overrides[f"config.mesh.{axis}"] = wanted[axis]
    if rules == SPREAD:
        axes = [axis for axis in _SPREAD_AXES if shape[axis] > 1]
        own = [entry.strip() for entry in base.mesh.rules.split(",") if entry.strip()]
        same = axes in ([], ["fsdp"]) or ("data" in axes and "fsdp" not in axes)  # which fsdp does by itself
        if same or any(entry.partition("=")[0].strip() == "embed" for entry in own):
            return None
        rules = ",".join([*own, f"embed={'+'.join(axes)}"])
    text = re.sub(r"\s+", "", rules)
    if text and text != re.sub(r"\s+", "", base.mesh.rules):
        overrides["config.mesh.rules"] = text
    return overrides


def _fields(fields: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


# Names and texts.


def _mesh_name(shape: Mapping[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in shape.items() if size > 1) or "one"


def _field_name(path: str, value: str) -> str:
    return f"{_plain(path.rpartition('.')[2])}-{_plain(value)}"


def _mark(overrides: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(overrides.items())).encode()).hexdigest()[:6]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _text(value: Any) -> str:
    return re.sub(r"\s+", "", str(value))
