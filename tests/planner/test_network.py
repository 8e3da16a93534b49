"""Seconds of collectives against counts by hand: rings and lines, shared links, kinds, slices."""

import dataclasses

import pytest

from t5x_like.planner import hlo
from t5x_like.planner.time import collectives, network
from t5x_like.planner.time.collectives import Collective
from t5x_like.planner.time.network import HOP_SECONDS, LINK_SHARE, spans, trip
from t5x_like.planner.time.schedule import Copy
from tests.planner.programs import fabric, module

GB = 10**9


def collective(kind, axes, size, moved=GB, shifts=()):
    return Collective(kind, axes, size, 1, moved, "", shifts=shifts)


def seconds(what, where):
    found = trip(what, where)
    return found.network, found.seconds


V5P = 100e9 * LINK_SHARE  # bytes a second of a link, one way


@pytest.mark.parametrize(
    ("name", "mesh", "axes", "links", "hops"),
    [
        ("v5p:4x4x4", {"fsdp": 64}, ("fsdp",), 6, 6),  # three rings, two links each
        ("v5p:4x4x4", {"data": 4, "fsdp": 16}, ("fsdp",), 4, 4),
        ("v5p:4x4x4", {"data": 4, "fsdp": 16}, ("data",), 2, 2),
        ("v5p:2x2x4", {"fsdp": 16}, ("fsdp",), 3, 5),  # no rings below a cube: three lines
        ("v5e:4x4", {"fsdp": 4, "tensor": 4}, ("tensor",), 1, 3),
        ("v5e:16x16", {"fsdp": 16, "tensor": 16}, ("tensor",), 2, 8),
        ("v5e:16x16", {"fsdp": 16, "data": 4, "tensor": 4}, ("tensor",), 1, 3),  # a part of a ring is a line
        ("v5e:16x16", {"fsdp": 16, "data": 4, "tensor": 4}, ("data",), 0.5, 8),  # every 4th chip: 4 groups share
    ],
)
def test_links_of_a_group_are_those_of_its_dims(name, mesh, axes, links, hops):
    where = fabric(name, mesh)
    size = [mesh[axis] for axis in axes]
    found = spans(where, where.group(axes, size[0]))
    assert (sum(span.links for span in found), sum(span.hops for span in found)) == (links, hops)


def test_gathering_and_scattering_send_all_but_ones_own_part_over_all_links():
    where = fabric("v5p:4x4x4", {"fsdp": 64})
    expected = GB * 63 / 64 / (6 * V5P) + 6 * HOP_SECONDS
    assert seconds(collective("all-gather", ("fsdp",), 64), where) == ("ici", pytest.approx(expected))
    assert seconds(collective("reduce-scatter", ("fsdp",), 64), where) == ("ici", pytest.approx(expected))
    assert seconds(collective("all-reduce", ("fsdp",), 64), where) == ("ici", pytest.approx(2 * expected))


def test_an_exchange_of_all_with_all_crosses_the_middle_of_the_longest_dim():
    """4 parts of 1 GB: half of each crosses the middle, a quarter of all one way. A ring has two middles."""
    ring = fabric("v5p:4x4x4", {"data": 16, "fsdp": 4})
    _, spent = seconds(collective("all-to-all", ("fsdp",), 4), ring)
    assert spent == pytest.approx(4 * GB / 4 / (2 * V5P) + 2 * HOP_SECONDS)
    line = fabric("v5e:4x4", {"data": 4, "fsdp": 4})
    _, spent = seconds(collective("all-to-all", ("fsdp",), 4), line)
    assert spent == pytest.approx(4 * GB / 4 / (50e9 * LINK_SHARE) + 3 * HOP_SECONDS)


@pytest.mark.parametrize(
    ("shifts", "times", "ways"), [((1,), 1, {1}), ((-1,), 1, {-1}), ((2,), 2, {1}), ((-1, 1), 1, {1, -1}), ((), 1, {1})]
)
def test_a_permutation_sends_each_buffer_over_as_many_links_as_it_moves_places(shifts, times, ways):
    where = fabric("v5p:4x4x4", {"data": 16, "fsdp": 4})
    found = trip(collective("collective-permute", ("fsdp",), 4, shifts=shifts), where)
    assert found.seconds == pytest.approx(times * (GB / V5P + HOP_SECONDS))
    assert set(found.lanes) == {(2, way) for way in ways}


def test_axes_on_other_dims_have_links_of_their_own():
    where = fabric("v5p:4x4x4", {"fsdp": 16, "tensor": 4})
    over = {axis: set(trip(collective("all-gather", (axis,), size), where).lanes) for axis, size in where.mesh.items()}
    assert over["tensor"] == {(2, 1), (2, -1)}
    assert over["fsdp"] == {(dim, way) for dim in (0, 1) for way in (1, -1)}


def test_a_group_of_fewer_devices_than_its_axes_hold_has_links_too():
    """The compiler passes borders on between three of four devices, which no axis divides into."""
    where = fabric("v5p:4x4x4", {"fsdp": 16, "tensor": 4})
    assert len(where.group(("fsdp", "tensor"), 3)) == 3
    assert seconds(collective("collective-permute", ("fsdp", "tensor"), 3), where)[1] > 0


def test_a_group_that_the_compiler_takes_from_its_axes_in_strides_has_the_links_of_its_own_devices():
    """Every second of 16 in rows of 4: two columns, two links apart, where the first eight would be two whole rows."""
    groups = "replica_groups={{0,2,4,6,8,10,12,14},{1,3,5,7,9,11,13,15}}"
    text = module(f"  %p = f32[250000000] parameter(0)\n  ROOT %r = f32[250000000] all-reduce(%p), {groups}")
    instruction = hlo.parse(text).computations["main"].instructions["r"]
    found = collectives.read(instruction, ["f32[250000000]"], {"fsdp": 16}, count=1)
    assert (found.axes, found.group_size, found.devices) == (("fsdp",), 8, (0, 2, 4, 6, 8, 10, 12, 14))
    where = fabric("v5e:4x4", {"fsdp": 16})
    strided = trip(found, where).seconds
    link, sent = 50e9 * LINK_SHARE, 2 * GB * 7 / 8
    assert strided == pytest.approx(sent / (link * (1 + 1 / 2)) + 2 * (3 + 2) * HOP_SECONDS)
    together = trip(dataclasses.replace(found, devices=()), where).seconds
    assert together == pytest.approx(sent / (link * (1 + 1)) + 2 * (3 + 1) * HOP_SECONDS)
    whole = dataclasses.replace(instruction, attributes="replica_groups=[1,16]<=[16]")
    assert collectives.read(whole, ["f32[250000000]"], {"fsdp": 16}, count=1).devices == ()


def test_two_devices_of_a_chip_share_its_links_and_reach_each_other_for_nothing():
    where = fabric("tpu7x:4x4x4", {"fsdp": 64, "tensor": 2})
    assert seconds(collective("all-reduce", ("tensor",), 2), where) == ("ici", 0.0)
    _, alone = seconds(collective("all-gather", ("fsdp",), 64), where)
    _, both = seconds(collective("all-gather", ("fsdp", "tensor"), 128), where)
    assert alone == pytest.approx(GB * 63 / 64 / (6 * V5P / 2) + 6 * HOP_SECONDS)
    assert both == pytest.approx(GB * 127 / 128 / (6 * V5P) + 6 * HOP_SECONDS)


def test_what_crosses_slices_goes_at_the_speed_of_their_network():
    where = fabric("v5p:4x4x4", {"slice": 2, "fsdp": 64}, slices=2)
    name, spent = seconds(collective("all-reduce", ("slice",), 2), where)
    assert (name, spent) == (network.DCN, pytest.approx(2 * (GB / 2 / 6.25e9 + network.DCN_SECONDS)))
    assert seconds(collective("all-reduce", ("fsdp",), 64), where)[0] == network.ICI


def test_a_buffer_for_another_slice_is_sent_whole_also_by_stages_that_lie_on_slices():
    """The first two devices along `stage`, were they looked for within a slice, are neighbours: 14 times as fast."""
    where = fabric("v5p:4x4x4", {"slice": 1, "stage": 2, "fsdp": 64}, slices=2)
    for axis in ("stage", "slice"):
        sent = dataclasses.replace(collective("collective-permute", (axis,), 2), network="dcn")
        assert seconds(sent, where) == (network.DCN, pytest.approx(GB / 6.25e9 + network.DCN_SECONDS))


def test_copies_go_at_the_speed_of_their_memory():
    where = fabric("v5p:4x4x4", {"fsdp": 64})
    assert seconds(Copy(2765 * 10**6, host=False), where) == ("hbm", pytest.approx(1e-3))
    assert seconds(Copy(16 * 10**6, host=True), where) == ("host", pytest.approx(1e-3))
