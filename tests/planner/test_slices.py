"""Several slices: what crosses the network between them is no collective in the text, and is counted as one."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like.core.errors import UsageError
from t5x_like.planner import hlo, report
from t5x_like.planner.compile import compile_program
from t5x_like.planner.time import collectives
from t5x_like.planner.time.cost import cost
from t5x_like.planner.topology import topology

ROWS, WIDTH = 256, 1024  # of a device
BUFFER = ROWS * WIDTH * 2  # bytes, bf16


@pytest.fixture(scope="module")
def mesh(compiler):
    found = topology("v5litepod-4", slices=2)
    assert (found.name, found.slices, found.chips, len(found.devices)) == ("v5e:2x2", 2, 8, 8)
    devices = mesh_utils.create_hybrid_device_mesh((1, 4), (2, 1), found.devices)
    return Mesh(devices, ("slice", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def planned(mesh, function, *arguments):
    compiled = compile_program(jax.jit(function), arguments, mesh=mesh)
    return compiled.text, cost(compiled.text, dict(mesh.shape))


def exchanges(x):
    return (
        jax.lax.psum(x, "slice"),
        jax.lax.all_gather(x, "slice"),
        jax.lax.psum_scatter(x, "slice", tiled=True),
        jax.lax.all_to_all(x, "slice", 0, 0, tiled=True),
        jax.lax.ppermute(x, "slice", [(0, 1), (1, 0)]),
    )


def test_every_kind_of_exchange_between_slices_is_counted_with_its_bytes(mesh):
    inner, whole = P("fsdp"), P(("slice", "fsdp"))
    mapped = jax.shard_map(
        exchanges, mesh=mesh, in_specs=whole, out_specs=(inner, P(None, "fsdp"), whole, whole, whole), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, whole))
    _, found = planned(mesh, mapped, x)
    assert {item.network for item in found.collectives} == {"dcn"}
    assert sorted(
        (item.kind, item.axes, item.group_size, item.count, item.bytes_each) for item in found.collectives
    ) == [
        ("all-gather", ("slice",), 2, 1, 2 * BUFFER),
        ("all-reduce", ("slice",), 2, 1, BUFFER),
        ("all-to-all", ("slice",), 2, 1, BUFFER),
        ("collective-permute", ("slice",), 2, 1, BUFFER),
        ("reduce-scatter", ("slice",), 2, 1, BUFFER),
    ]


def test_a_reduction_over_all_devices_goes_over_both_networks_once_a_turn(mesh):
    """Within a slice the buffer is scattered first, so that a quarter of it crosses."""

    def run(x):
        def turn(x, _):
            return jax.lax.psum(x, ("slice", "fsdp")) * 0.5, None

        return jax.lax.scan(turn, x, length=5)[0]

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=P(("slice", "fsdp")), out_specs=P(("slice", "fsdp")), check_vma=False
    )
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P(("slice", "fsdp"))))
    text, found = planned(mesh, mapped, x)
    between = [item for item in found.collectives if item.network == "dcn"]
    assert [(item.kind, item.count, item.bytes_each) for item in between] == [("all-reduce", 5, BUFFER // 4)]
    assert {item.axes for item in found.collectives if item.network == "ici"} == {("fsdp",)}
    totals = collectives.totals(found.collectives)
    assert {(total.network, total.axes) for total in totals} == {("ici", ("fsdp",)), ("dcn", ("slice",))}
    # Start and end stand in the schedule, for whoever asks what runs meanwhile.
    module = hlo.parse(text)
    places = [t for c in module.computations.values() for t in collectives.transfers(c, dict(mesh.shape), count=1)]
    assert len(places) == 1 and 0 < places[0].start < places[0].done


TARGETS = {
    '"{1,2}x{0:3}"': 2,
    '"{1:4}x{0:63}"': 4,
    "{{100000,200000},{100001,200001}}": 2,
    "{{100000->200000},{200000->300000},{300000->100000}}": 3,
}


@pytest.mark.parametrize(("target", "size"), TARGETS.items())
def test_slices_that_exchange_are_read_in_all_forms(target, size):
    runtime = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r"'
    kind = '_xla_megascale_transfer_type="ALL_REDUCE"'
    attributes = f"channel_id=1, frontend_attributes={{{runtime},_xla_megascale_target={target},{kind}}}"
    text = (
        "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %p = f32[8] parameter(0)\n  %t = token[] after-all()\n"
        f"  %send = (f32[8], u32[], token[]) send(%p, %t), {attributes}\n"
        f"  %recv = (f32[8], u32[], token[]) recv(%t), {attributes}\n"
        "  %send-done = token[] send-done(%send), channel_id=1\n"
        "  %recv-done = (f32[8], token[]) recv-done(%recv), channel_id=2\n"
        "  ROOT %out = f32[8] get-tuple-element(%recv-done), index=0\n}\n"
    )
    found = cost(text, {"slice": 4, "fsdp": 2}).collectives
    assert [(item.kind, item.group_size, item.bytes_each) for item in found] == [("all-reduce", size, 32)]


def test_exchanges_of_stages_that_lie_on_slices_are_over_the_axis_stage():
    runtime = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="r"'
    target = '_xla_megascale_transfer_type="ONE_TO_ONE",_xla_megascale_target={{100000->200000}}'
    attributes = f"channel_id=1, frontend_attributes={{{runtime},{target}}}"
    text = (
        "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %p = f32[8] parameter(0)\n  %t = token[] after-all()\n"
        f"  %send = (f32[8], u32[], token[]) send(%p, %t), {attributes}\n"
        f"  %recv = (f32[8], u32[], token[]) recv(%t), {attributes}\n"
        "  %send-done = token[] send-done(%send)\n"
        "  %recv-done = (f32[8], token[]) recv-done(%recv)\n"
        "  ROOT %out = f32[8] get-tuple-element(%recv-done), index=0\n}\n"
    )
    (found,) = cost(text, {"slice": 1, "stage": 2, "fsdp": 2}).collectives
    assert (found.kind, found.axes, found.group_size, found.network) == ("collective-permute", ("stage",), 2, "dcn")


def test_a_number_of_slices_that_is_none_is_one_line():
    with pytest.raises(UsageError, match="--slices=0 should be a number of slices, at least 1"):
        topology("v5e:2x2", slices=0)


def test_a_plan_of_several_slices_says_that_they_have_no_rings():
    def place(name, slices):
        return report.Place(name, slices, 64 * slices, {"slice": slices, "fsdp": 64}, 2**34)

    assert "no rings" in report.notes(place("v5p:4x4x4", 2))[0]
    assert report.notes(place("v5p:4x4x4", 1)) == report.notes(place("v5e:4x4", 2)) == []
