"""Programs small enough to count by hand, compiled by the real TPU compiler: collectives, memory, cycles."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like.core.errors import UserError
from t5x_like.planner.compile import compile_program
from t5x_like.planner.time.cost import cost
from t5x_like.planner.topology import topology

AXES = ("data", "fsdp", "tensor")


@pytest.fixture(scope="module")
def mesh(compiler):
    devices = mesh_utils.create_device_mesh((2, 2, 2), topology("v5e:2x4").devices)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def array(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def plan(mesh, function, *arguments, **options):
    compiled = compile_program(jax.jit(function, **options), arguments, mesh=mesh)
    return compiled.memory, cost(compiled.text, dict(mesh.shape))


def counted(found):
    return sorted((item.kind, item.axes, item.count, item.bytes_each) for item in found.collectives)


def layers(count):
    """A scan of `count` layers tanh(x w), whose weights are gathered over fsdp."""

    def run(w_LDD, x_BD):
        def layer(x_BD, w_DD):
            return jnp.tanh(x_BD @ jax.lax.with_sharding_constraint(w_DD, P(None, None))), None

        return jax.lax.scan(layer, x_BD, w_LDD)[0]

    return run, ((count, 1024, 1024), None, "fsdp", None), ((512, 1024), "data", None)


def test_each_turn_of_a_scan_gathers_its_weights(mesh):
    run, weights, x = layers(6)
    memory, found = plan(mesh, run, array(mesh, *weights), array(mesh, *x))
    assert counted(found) == [("all-gather", ("fsdp",), 6, 1024 * 1024 * 2)]
    # A device holds half of every layer's weights and half of the rows; the output is half of the rows.
    assert memory.arguments_bytes == 6 * 512 * 1024 * 2 + 256 * 1024 * 2
    assert memory.outputs_bytes == 256 * 1024 * 2
    assert memory.aliased_bytes == 0


def test_cycles_grow_by_the_same_amount_for_each_layer(mesh):
    cycles = []
    for count in (4, 8, 12):
        run, weights, x = layers(count)
        cycles.append(plan(mesh, run, array(mesh, *weights), array(mesh, *x))[1].cycles)
    assert cycles[0] > 0
    assert cycles[2] - cycles[1] == cycles[1] - cycles[0] > 0


def test_cycles_of_a_large_product_are_near_the_peak_of_the_chip(mesh):
    """v5e: 197 TFLOP/s at 1.5 GHz, so 131072 operations a cycle."""

    def product(a, b):
        return a @ b

    side = 8192
    _, found = plan(mesh, product, array(mesh, (side, side)), array(mesh, (side, side)))
    assert 1.0 <= found.cycles / (2 * side**3 / 131072) < 1.5


def test_a_tensor_parallel_product_is_reduced_over_its_axis_alone(mesh):
    def mlp(x_BD, up_DF, down_FD):
        hidden_BF = jax.lax.with_sharding_constraint(x_BD @ up_DF, P("data", "tensor"))
        return jax.lax.with_sharding_constraint(hidden_BF @ down_FD, P("data", None))

    up, down = array(mesh, (1024, 2048), None, "tensor"), array(mesh, (2048, 1024), "tensor", None)
    memory, found = plan(mesh, mlp, array(mesh, (512, 1024), "data", None), up, down)
    assert counted(found) == [("all-reduce", ("tensor",), 1, 256 * 1024 * 2)]
    assert memory.arguments_bytes == (256 * 1024 + 1024 * 1024 + 1024 * 1024) * 2


def test_nested_loops_multiply(mesh):
    def run(x_BD):
        def inner(_, x_BD):
            return jax.lax.psum(x_BD, "tensor") * 0.5

        def outer(x_BD, _):
            return jax.lax.ppermute(jax.lax.fori_loop(0, 3, inner, x_BD), "data", [(0, 1), (1, 0)]), None

        return jax.lax.scan(outer, x_BD, length=5)[0]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    _, found = plan(mesh, mapped, array(mesh, (512, 1024), "data", None, dtype=jnp.float32))
    size = 256 * 1024 * 4
    assert counted(found) == [("all-reduce", ("tensor",), 15, size), ("collective-permute", ("data",), 5, size)]
    assert found.unknown_loops == ()


def test_a_conditional_costs_its_dearer_branch(mesh):
    def work(times):
        def run(x_BD, w_DD):
            for _ in range(times):
                x_BD = jnp.tanh(x_BD @ w_DD)
            return x_BD

        return run

    def either(choice, x_BD, w_DD):
        return jax.lax.cond(choice > 0, work(6), work(3), x_BD, w_DD)

    x, w = array(mesh, (512, 1024)), array(mesh, (1024, 1024))
    three, six = (plan(mesh, work(times), x, w)[1].cycles for times in (3, 6))
    _, found = plan(mesh, either, array(mesh, (), dtype=jnp.int32), x, w)
    assert three < 0.6 * six
    assert abs(found.cycles - six) < 0.5 * three  # entering a branch copies; both branches would be `three` more


def test_donated_arguments_are_counted_once(mesh):
    memory, _ = plan(mesh, lambda x: x + 1, array(mesh, (1024, 1024), "data", dtype=jnp.float32), donate_argnums=0)
    assert memory.aliased_bytes == memory.arguments_bytes == memory.outputs_bytes == 512 * 1024 * 4
    assert memory.total_bytes == memory.arguments_bytes + memory.temporaries_bytes


def test_pallas_kernels_are_counted_by_name(mesh):
    def double(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    def run(x_BD):
        def layer(x_BD, _):
            kernel = pl.pallas_call(double, jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype), name="doubling")
            return kernel(x_BD), None

        return jax.lax.scan(layer, x_BD, length=7)[0]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    _, found = plan(mesh, mapped, array(mesh, (512, 128), "data", dtype=jnp.float32))
    assert [(kernel.name, kernel.count) for kernel in found.kernels] == [("doubling", 7)]


def test_a_program_that_does_not_fit_is_one_line_with_both_sizes(mesh):
    x = array(mesh, (2**16, 2**16), "data", dtype=jnp.float32)
    with pytest.raises(UserError, match=r"does not fit: .* need [\d.]+GiB of the 15\.75GiB HBM") as error:
        plan(mesh, lambda x: jnp.sort(jnp.sort(x, axis=0) @ x, axis=1), x)
    assert "\n" not in str(error.value)
