"""THE table: which logical axis of a tensor lies on which axes of the mesh. Nothing else decides a sharding.

One table serves every preset, because a mesh axis of size 1 shards nothing: a preset is a default shape of the
mesh. A run changes single entries with `config.mesh.rules="mlp=tensor+sequence, embed="`.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from jax.sharding import PartitionSpec

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError
from t5x_like.core.types import Axes

# Slowest link first: `slice` crosses the data-centre network, `tensor` wants the nearest neighbours.
MESH_AXES = ("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor")

TABLE: dict[str, tuple[str, ...]] = {
    # Dims of parameters. `embed` is the one that FSDP gathers before use.
    "layers": ("stage",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    "positions": (),
    "types": (),
    "buckets": (),
    "rank": (),
    # Dims of activations. Outside of the layers, rows lie on the stages of a pipeline too.
    "batch": ("slice", "stage", "data", "fsdp", "expert"),
    "length": ("sequence",),
    "kv_length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
}

# Sizes of mesh axes where the config says None; -1 takes the devices that are left, axes not named have size 1.
PRESETS: dict[str, dict[str, int]] = {
    "data": {"data": -1},
    "fsdp": {"fsdp": -1},
    "fsdp_tensor": {"fsdp": -1, "tensor": 2},
    "fsdp_tensor_sequence": {"fsdp": -1, "tensor": 2, "sequence": 2},
}

# Fewer key-value heads than tensor shards: each shard then holds all of them.
MAY_REPLICATE = ("kv_heads", "act_kv_heads")


@dataclasses.dataclass(frozen=True)
class Rules:
    """The table in force: hashable, so that a jitted function belongs to one of them."""

    table: tuple[tuple[str, tuple[str, ...]], ...]

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        if axis is None:
            return ()
        for name, mesh_axes in self.table:
            if name == axis:
                return mesh_axes
        raise UsageError(f"logical axis {axis!r} has no rule; {nearest(axis, dict(self.table))}")

    def without(self, mesh_axis: str) -> "Rules":
        """The table in which nothing lies on this mesh axis.

        >>> rules().without("stage").mesh_axes("layers")
        ()
        """
        return Rules(tuple((name, tuple(axis for axis in axes if axis != mesh_axis)) for name, axes in self.table))

    def spec(self, axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
        """Where a tensor with these axes and this shape lies on a mesh with these axis sizes.

        Dims of size 1 (scales, one decoded token) and key-value heads that do not divide are replicated.
        Raises UsageError for any other dim that does not divide, and for a mesh axis that would be used twice.
        """
        entries: list[tuple[str, ...] | None] = []
        taken: dict[str, str | None] = {}
        for axis, dim in zip(axes, shape, strict=True):
            mesh_axes = tuple(name for name in self.mesh_axes(axis) if sizes.get(name, 1) > 1)
            shards = _product(sizes[name] for name in mesh_axes)
            if dim == 1 or shards == 1 or (axis in MAY_REPLICATE and dim % shards):
                entries.append(None)
                continue
            if dim % shards:
                composed = " x ".join(f"{name}={sizes[name]}" for name in mesh_axes)
                raise UsageError(
                    f"dim {axis!r} of size {dim} is not divisible by its {shards} shards ({composed}); "
                    f"change the size, the mesh, or config.mesh.rules for {axis!r}"
                )
            for name in mesh_axes:
                if name in taken:
                    raise UsageError(
                        f"mesh axis {name!r} would shard both {taken[name]!r} and {axis!r} of one tensor {axes}; "
                        "change config.mesh.rules"
                    )
                taken[name] = axis
            entries.append(mesh_axes)
        return PartitionSpec(*entries)

    def replicated_heads(self, kv_heads: int, sizes: Mapping[str, int]) -> bool:
        """Whether key-value heads fall back to replication, which the start-up summary says."""
        return kv_heads % _product(sizes.get(name, 1) for name in self.mesh_axes("kv_heads")) != 0


def rules(overrides: str = "", *, field: str = "config.mesh.rules") -> Rules:
    """The table with `overrides` such as "mlp=tensor+sequence, embed=" applied; unknown names are errors, which name
    the field of the config that they stand in.

    >>> rules("embed=").mesh_axes("embed")
    ()
    """
    table = dict(TABLE)
    for entry in filter(None, (part.strip() for part in overrides.split(","))):
        axis, equals, value = (part.strip() for part in entry.partition("="))
        where = f"{field} entry {entry!r}"
        if not equals:
            raise UsageError(f"{where} should read AXIS=MESH_AXIS+MESH_AXIS, or AXIS= for replicated")
        if axis not in table:
            raise UsageError(f"{where} names an unknown logical axis; {nearest(axis, table)}")
        mesh_axes = tuple(filter(None, (part.strip() for part in value.split("+"))))
        for name in mesh_axes:
            if name not in MESH_AXES:
                raise UsageError(f"{where} names an unknown mesh axis {name!r}; {nearest(name, MESH_AXES)}")
        if table[axis] == mesh_axes:
            raise UsageError(f"{where} changes nothing; remove it")
        table[axis] = mesh_axes
    return Rules(tuple(sorted(table.items())))


def gathered(table: Rules) -> Rules:
    """The table of weights that lie whole wherever they are multiplied with: nothing of what FSDP or pipeline stages
    divide is gathered at use. What tensor parallelism divides stays divided.

    >>> gathered(rules()).mesh_axes("embed"), gathered(rules()).mesh_axes("mlp")
    ((), ('tensor',))
    """
    return Rules(tuple((name, () if name in ("embed", "layers") else mesh_axes) for name, mesh_axes in table.table))


def unused(overridden: Rules, axes_in_use: Iterable[str | None]) -> list[str]:
    """Logical axes whose rule differs from the table although no tensor of the run has them."""
    return sorted({name for name, mesh_axes in overridden.table if TABLE[name] != mesh_axes} - set(axes_in_use))


def idle(table: Rules, sizes: Mapping[str, int]) -> list[str]:
    """Mesh axes larger than 1 that no rule uses: whatever lies on them is there as often, and computed as often.

    >>> idle(rules("length="), {"data": 4, "sequence": 2})
    ['sequence']
    """
    used = {name for _, mesh_axes in table.table for name in mesh_axes}
    return [axis for axis, size in sizes.items() if size > 1 and axis not in used]


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
