"""Replica groups become mesh axes, and buffers become bytes, whichever way the compiler writes them."""

import pytest

from t5x_like.planner import hlo
from t5x_like.planner.time import collectives

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
        ("replica_groups={{0,1,4,5},{2,3,6,7}}", ("data", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("replica_groups=[4,2]<=[4,2]T(0,1)", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=1,'d'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2, 'a':(4)2}", ("data", "tensor")),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}", ("data",)),
        ("source_target_pairs={{0,2},{2,0}}", ("fsdp",)),
    ],
)
def test_groups_are_named_by_the_axes_they_span(text, axes):
    found, size = collectives.axes_of(collectives.groups_of(text, 8), CUBE)
    assert found == axes
    assert size == 2 ** len(axes)


def test_a_part_of_an_axis_keeps_the_axis_name_and_a_smaller_group():
    groups = collectives.groups_of("replica_groups=[16,4]<=[64]", 64)
    assert collectives.axes_of(groups, {"data": 1, "fsdp": 64}) == (("fsdp",), 4)


def test_axes_of_size_one_are_not_named():
    mesh = {"slice": 1, "data": 2, "fsdp": 1, "tensor": 4}
    assert collectives.axes_of([[0, 1, 2, 3], [4, 5, 6, 7]], mesh) == (("tensor",), 4)


@pytest.mark.parametrize(
    ("line", "operands", "kind", "size"),
    [
        ("%g = f32[16,128] all-gather(%x)", ["f32[4,128]"], "all-gather", 16 * 128 * 4),
        ("%g = (f32[4,128], f32[16,128]) all-gather-start(%x)", ["f32[4,128]"], "all-gather", 16 * 128 * 4),
        ("%s = f32[4,128] reduce-scatter(%x)", ["f32[16,128]"], "reduce-scatter", 16 * 128 * 4),
        ("%r = (f32[8], bf16[8]) all-reduce(%x, %y)", ["f32[8]", "bf16[8]"], "all-reduce", 48),
        ("%r = (f32[8], bf16[8]) all-reduce-start(%x, %y)", ["f32[8]", "bf16[8]"], "all-reduce", 48),
        ("%t = bf16[2,4] all-to-all(%x)", ["bf16[2,4]"], "all-to-all", 16),
        (
            "%p = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
            ["f32[8]"],
            "collective-permute",
            32,
        ),
    ],
)
def test_bytes_are_those_of_the_whole_buffer(line, operands, kind, size):
    module = hlo.parse(f"ENTRY %main (p: f32[]) -> f32[] {{\n  {line}\n}}\n")
    (instruction,) = module.computations["main"].instructions.values()
    found = collectives.read(instruction, operands, {"fsdp": 4}, count=3)
    assert (found.kind, found.bytes_each, found.count) == (kind, size, 3)


def test_the_done_half_of_a_pair_is_no_collective():
    assert collectives.kind_of("all-gather-start") == "all-gather"
    assert collectives.kind_of("all-gather-done") is None
    assert collectives.kind_of("add") is None


def test_totals_add_what_is_of_one_kind_and_axes():
    def item(kind, axes, count, size):
        return collectives.Collective(kind, axes, 2, count, size, source="")

    items = [
        item("all-gather", ("fsdp",), 3, 10),
        item("all-gather", ("tensor",), 1, 500),
        item("all-gather", ("fsdp",), 2, 100),
    ]
    assert collectives.totals(items) == (
        collectives.Total("all-gather", ("tensor",), 2, 1, 500),
        collectives.Total("all-gather", ("fsdp",), 2, 5, 230),
    )
