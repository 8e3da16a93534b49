"""The time of a step and what follows from it: by hand, and of a small program of the real compiler."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_like.core.terminal import format_count
from t5x_like.planner.compile import compile_program
from t5x_like.planner.time import estimate as estimates
from t5x_like.planner.time import kernels, network
from t5x_like.planner.time import report as report_time
from t5x_like.planner.time.cost import cost
from t5x_like.planner.time.estimate import IterationTime, Price, Work, estimate
from t5x_like.planner.time.schedule import Op
from t5x_like.planner.topology import topology
from tests.planner.programs import by_region, cycles, fabric, module, named
from tests.planner.test_cost import P as PARAMETER

V5P_CYCLES = 1_750_946_045  # of a second


@pytest.fixture(autouse=True)
def unfitted(monkeypatch):
    """The constants that are fitted to published runs at values that one can count with."""
    for name in ("CYCLE_SHARE", "MATRIX_SHARE", "EXPOSED_SHARE"):
        monkeypatch.setattr(estimates, name, 1.0)
    monkeypatch.setattr(kernels, "EFFICIENCY", 0.5)
    monkeypatch.setattr(kernels, "STEP_SECONDS", 0.0)


def of_text(*main, price=None, work=None):
    """Of a program on 4x4x4 v5p."""
    found = cost(module("\n".join([PARAMETER, *main])), {"fsdp": 64})
    return found, estimate(found, fabric("v5p:4x4x4", {"fsdp": 64}), chips=64, work=work, price=price)


def test_a_step_is_what_it_computes_its_kernels_and_what_of_collectives_is_exposed():
    """A second of computing; a kernel; 5.4 GB gathered over 6 links of 90 GB/s: 10 ms less a 64th, and 6 hops."""
    shapes = "bf16[4,32,4096,128]", "bf16[4,8,4096,128]"
    metadata = r'kernel_metadata={"xprof_metadata":"{\"block_q\": 1024, \"block_kv\": 1024}"}'
    attributes = f'custom_call_target="tpu_custom_call", frontend_attributes={{{metadata}}}'
    _, time = of_text(
        f"  %w = f32[8,128] copy(%p), {cycles(V5P_CYCLES)}",
        "  %t = s8[1,4,4] constant({...})",
        "  %n = s32[4096,128] iota(), iota_dimension=0",
        f"  %q = {shapes[0]} bitcast(%p)",
        f"  %k = {shapes[1]} bitcast(%p)",
        f"  %splash_mha_fwd.1 = {shapes[0]} custom-call(%t, %t, %q, %k, %k, %n), {attributes}",
        "  %s = bf16[2700000000] all-gather(%p), replica_groups=[1,64]<=[64], dimensions={0}",
    )
    flops = 4 * 32 * 10 * 2 * 2 * 1024 * 1024 * 128
    gathered = 5.4e9 * 63 / 64 / 540e9 + 6 * network.HOP_SECONDS
    assert time.parts["compute"] == pytest.approx(1, rel=1e-6)
    assert time.parts["kernels"] == pytest.approx(flops / 459e12 / 0.5)
    assert time.parts["exposed_ici"] == pytest.approx(gathered)
    assert time.step_seconds == pytest.approx(sum(time.parts.values()))
    assert time.hardware_flops == 64 * flops
    (kernel,) = time.kernels
    assert (kernel.name, kernel.count, kernel.flops) == ("splash_mha_fwd", 1, flops)
    json = report_time.to_json(time)
    (total,) = json["collectives"]
    assert (total["bytes"], total["exposed_seconds"]) == (5_400_000_000, pytest.approx(gathered))
    assert sum(item["cycles"] for item in json["regions"]) == V5P_CYCLES
    assert [item["name"] for item in json["operations"]][:2] == ["w", "splash_mha_fwd.1"]
    (item,) = json["collective_instructions"]
    assert (item["asynchronous"], item["instructions_between"], item["computing_seconds_between"]) == (False, None, 0)
    assert item["exposed_seconds"] == pytest.approx(gathered) and item["kind"] == "all-gather"
    text, table = "\n".join(report_time.lines(time)), "\n".join(report_time.cycle_lines(time))
    assert f"FLOPs of all devices: {format_count(64 * flops)} are computed (hardware FLOPs)" in text
    assert table.splitlines()[0].split() == ["cycles", "no", "pass", "together"]
    assert "1.751e+09 together, without collectives" in table
    details = "\n".join(report_time.detail_lines(time))
    assert "splash_mha_fwd.1" in details
    assert "5.03 GiB 5,400,000,000" in details


def test_what_follows_from_a_step_of_a_second():
    work = Work(tokens=1_000_000, model_flops=0.5 * 459e12 * 64, full_flops=0.6 * 459e12 * 64, executions=7200)
    price = Price(4.2, "USD")
    _, time = of_text(f"  %w = f32[8,128] copy(%p), {cycles(V5P_CYCLES)}", work=work, price=price)
    assert time.mfu == pytest.approx(0.5, rel=1e-6)
    assert time.mfu_full_attention == pytest.approx(0.6, rel=1e-6)
    assert time.tokens_per_second == pytest.approx(1e6, rel=1e-6)
    assert time.run_seconds == pytest.approx(7200, rel=1e-6)
    assert time.chip_hours == pytest.approx(128, rel=1e-6)
    assert time.cost == pytest.approx(128 * 4.2, rel=1e-6)
    text = "\n".join(report_time.lines(time))
    assert "estimated" in text
    assert "MFU 50.0%, or 60.0% with attention counted in full" in text
    assert "2 hours, 128 chip-hours, 538 USD" in text
    assert "model FLOPs 14.7P a step, 17.6P with attention counted in full; 0 are computed (hardware FLOPs)" in text
    assert "a million tokens cost 0.075 USD" in text


def test_a_price_is_also_one_of_tokens_where_nothing_says_how_often_a_program_runs():
    """64 chips for a second a million tokens, such as those of decoding."""
    work = Work(tokens=1_000_000, model_flops=None, full_flops=None)
    _, time = of_text(f"  %w = f32[8,128] copy(%p), {cycles(V5P_CYCLES)}", work=work, price=Price(3.6, "USD"))
    assert time.cost is None
    assert report_time.to_json(time)["estimate"]["cost_per_million_tokens"] == pytest.approx(0.064, rel=1e-6)
    assert "a million tokens cost 0.064 USD" in "\n".join(report_time.lines(time))


@pytest.mark.parametrize(
    ("main", "bound"),
    [
        (
            [f"  %w = f32[8,128] copy(%p), {named('jit(s)/jvp(loss)/layers/mlp/x')}, {cycles(9_000_000)}"],
            "computing in mlp",
        ),
        (["  %s = bf16[2700000000] all-gather(%p), replica_groups=[1,64]<=[64], dimensions={0}"], "waiting for ICI"),
    ],
)
def test_the_largest_part_bounds_a_step(main, bound):
    assert of_text(*main)[1].bound_by == bound


def test_an_iteration_takes_what_its_programs_take_as_often_as_they_run():
    second = f"  %w = f32[8,128] copy(%p), {named('jit(s)/layers/mlp/x')}, {cycles(V5P_CYCLES)}"
    one = of_text(second, price=Price(2.0, "EUR"))[1]
    time = IterationTime({"rollout": (3, one), "update": (1, one)}, executions=900)
    assert time.parts == pytest.approx({"rollout": 3, "update": 1}, rel=1e-6)
    assert time.bound_by == "rollout: computing in mlp"
    assert time.run_seconds == pytest.approx(3600, rel=1e-6)
    assert time.cost == pytest.approx(64 * 2, rel=1e-6)
    assert "the run takes 1 hours, 64 chip-hours, 128 EUR" in report_time.iteration_lines(time)[0]


LAYERS, ROWS, WIDTH, LENGTH, HEADS, SIZE = 4, 8, 512, 1024, 4, 128


def _attention(q_BNTH):
    mask = splash.MultiHeadMask([splash.CausalMask((LENGTH, LENGTH))] * HEADS)
    sizes = splash.BlockSizes(256, 256, 256, 256, 256, 256, 256, 256)
    return jax.vmap(splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes))(
        q_BNTH, q_BNTH, q_BNTH
    )


def _step(w_LDD, x_BTD):
    """Layers of attention and one product, recomputed in the backward pass, and an update."""

    def layer(x_BTD, w_DD):
        with jax.named_scope("attention"):
            q_BNTH = x_BTD.reshape(-1, LENGTH, HEADS, SIZE).transpose(0, 2, 1, 3)
            spec = P("fsdp")
            out: Any = jax.shard_map(_attention, in_specs=spec, out_specs=spec, check_vma=False)(q_BNTH)
            x_BTD = out.transpose(0, 2, 1, 3).reshape(x_BTD.shape)
        with jax.named_scope("mlp"):
            w_DD = jax.lax.with_sharding_constraint(w_DD, P(None, None))
            return jnp.tanh(jnp.einsum("BTD,DE->BTE", x_BTD, w_DD)), None

    def loss(w_LDD):
        with jax.named_scope("layers"):
            hidden, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x_BTD, w_LDD)
        return (hidden.astype(jnp.float32) ** 2).sum()

    grads = jax.grad(loss)(w_LDD)
    with jax.named_scope("optimizer"):
        return w_LDD - grads


@pytest.fixture(scope="module")
def planned(compiler):
    devices = mesh_utils.create_device_mesh((4,), topology("v5e:2x2").devices)
    mesh = Mesh(devices, ("fsdp",), axis_types=(AxisType.Auto,))

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    weights = array((LAYERS, WIDTH, WIDTH), None, "fsdp", None)
    compiled = compile_program(
        jax.jit(_step, out_shardings=weights.sharding), (weights, array((ROWS, LENGTH, WIDTH), "fsdp")), mesh=mesh
    )
    found = cost(compiled.text, dict(mesh.shape))
    return found, estimate(found, network.fabric(list(mesh.devices.flat), dict(mesh.shape)), chips=4)


def test_kernels_of_a_real_program_are_counted_by_pass_with_the_flops_of_their_blocks(planned):
    """Everything is recomputed: two rows a device, 4 heads, 10 of 16 blocks of 256 x 256."""
    _, time = planned
    products = ROWS // 4 * HEADS * 10 * 2 * 256 * 256 * SIZE
    found = {(kernel.name.split("_")[2], kernel.which): (kernel.count, kernel.flops) for kernel in time.kernels}
    assert found == {
        ("fwd", "forward"): (LAYERS, LAYERS * 2 * products),
        ("fwd", "recomputed"): (LAYERS, LAYERS * 2 * products),
        ("dq", "backward"): (LAYERS, LAYERS * 3 * products),
        ("dkv", "backward"): (LAYERS, LAYERS * 4 * products),
    }
    assert {kernel.region for kernel in time.kernels} == {"attention"}


def test_products_of_a_real_program_have_their_flops_in_each_pass(planned):
    _, time = planned
    one = 2 * (ROWS // 4) * LENGTH * WIDTH * WIDTH
    found = {which: each.flops for (region, which), each in time.regions.items() if region == "mlp"}
    assert found == {"forward": LAYERS * one, "recomputed": LAYERS * one, "backward": LAYERS * 2 * one}
    in_kernels = sum(kernel.flops for kernel in time.kernels)
    assert time.hardware_flops == 4 * (4 * LAYERS * one + in_kernels)


def test_the_parts_of_a_real_program_add_up_and_nothing_costs_less_than_the_peak(planned):
    found, time = planned
    assert time.step_seconds == pytest.approx(sum(time.parts.values()))
    computed = sum(each.seconds for each in time.regions.values())
    assert computed == pytest.approx(time.parts["compute"] + time.parts["kernels"])
    waited = sum(each.waiting for each in time.regions.values())
    assert waited == pytest.approx(time.step_seconds - computed)
    assert time.hardware_utilisation is not None
    assert 0.05 < time.hardware_utilisation < 1
    moved = {(f.collective.kind, f.collective.count, f.collective.bytes_each) for f in time.flights if f.collective}
    assert ("all-gather", LAYERS, WIDTH * WIDTH * 2) in moved
    assert 0 <= time.parts["exposed_ici"] <= sum(flight.seconds for flight in time.flights) * (1 + 1e-9)
    names = {region for region, _ in by_region(found.schedule)}
    assert {"attention", "mlp", "layers", "optimizer"} <= names


def test_constants_that_are_fitted_to_published_runs_scale_their_parts(monkeypatch):
    """A product takes its FLOPs at a share of the peak and a share of the cycles above these, and is spared no more
    than they need at the peak; other work takes all of its cycles."""
    row = fabric("v5p:4x4x4", {"fsdp": 64}).row
    monkeypatch.setattr(estimates, "CYCLE_SHARE", 0.5)
    monkeypatch.setattr(estimates, "MATRIX_SHARE", 0.8)
    monkeypatch.setattr(estimates, "EXPOSED_SHARE", 0.25)
    seconds = estimates.computing_seconds
    for at_peak, expected in ((0.0, 1.0), (0.1, 0.925), (0.5, 0.875), (0.6, 0.95), (1.0, 1.25)):
        product = Op("a", "", cycles=V5P_CYCLES, flops=int(at_peak * row.peak))
        assert seconds(product, row) == pytest.approx(expected, rel=1e-6)
    taken = [seconds(Op("a", "", cycles=c * V5P_CYCLES // 10, flops=int(row.peak)), row) for c in range(10, 40)]
    assert all(less < more for less, more in zip(taken, taken[1:], strict=False)), "searches rank by cycles"
    gather = "  %s = bf16[2700000000] all-gather(%p), replica_groups=[1,64]<=[64], dimensions={0}"
    _, time = of_text(f"  %w = f32[8,128] copy(%p), {cycles(V5P_CYCLES)}", gather)
    gathered = 5.4e9 * 63 / 64 / 540e9 + 6 * network.HOP_SECONDS
    assert time.parts["compute"] == pytest.approx(1, rel=1e-6)
    assert time.parts["exposed_ici"] == pytest.approx(gathered / 4)
    assert time.exposed_step_seconds == pytest.approx(1 + gathered, rel=1e-6)


def test_exposed_is_what_the_schedule_leaves_and_a_fitted_share_of_it_is_waiting(monkeypatch):
    """A gather that nothing runs beside is exposed whole, wherever the word stands; only ICI and HBM have the share."""
    monkeypatch.setattr(estimates, "EXPOSED_SHARE", 0.25)
    source = named("jit(s)/layers/mlp/x")
    exchange = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
    attributes = f'frontend_attributes={{{exchange},_xla_host_transfer_rendezvous="a"}}'
    main = [
        f"  %s = bf16[2700000000] all-gather(%p), replica_groups=[1,64]<=[64], dimensions={{0}}, {source}",
        "  %t = token[] after-all()",
        f"  %send = (f32[64000000], u32[], token[]) send(%p, %t), channel_id=1, {attributes}",
        f"  %recv = (f32[64000000], u32[], token[]) recv(%t), channel_id=2, {attributes}",
        "  %sent = token[] send-done(%send), channel_id=1",
        "  %got = (f32[64000000], token[]) recv-done(%recv), channel_id=2",
    ]
    found = cost(module("\n".join([PARAMETER, *main])), {"slice": 2, "fsdp": 64})
    time = estimate(found, fabric("v5p:4x4x4", {"slice": 2, "fsdp": 64}, slices=2), chips=128)
    raw = {flight.network: flight.exposed for flight in time.flights}
    assert raw["ici"] > 0 and raw["dcn"] > 0
    assert time.parts["exposed_ici"] == pytest.approx(raw["ici"] / 4)
    assert time.parts["exposed_dcn"] == pytest.approx(raw["dcn"])
    json = report_time.to_json(time)
    assert {item["network"]: item["exposed_seconds"] for item in json["collectives"]} == pytest.approx(raw)
    assert sum(item["exposed_seconds"] for item in json["regions"]) == pytest.approx(sum(raw.values()))
    waited = sum(item["waiting_seconds"] for item in json["regions"])
    assert waited == pytest.approx(json["estimate"]["step_seconds"]) == pytest.approx(sum(time.parts.values()))
    assert json["estimate"]["exposed"] == pytest.approx({f"exposed_{n}": raw.get(n, 0) for n in network.NETWORKS})
    assert json["estimate"]["constants"]["EXPOSED_SHARE"] == 0.25
    assert "that the schedule leaves exposed" in "\n".join(report_time.lines(time))


def test_the_region_that_bounds_computing_is_the_one_that_computes_longest_without_kernels(monkeypatch):
    """mlp computes 1.6 s; attention 1.4 s and 1.0 s of kernels, which are a part of their own."""
    monkeypatch.setattr(kernels, "roofline", lambda call, row: kernels.Roofline(flops=1, seconds=1.0))
    mlp, attention = named("jit(s)/jvp(loss)/layers/mlp/x"), named("jit(s)/jvp(loss)/layers/attention/x")
    _, time = of_text(
        f"  %w = f32[8,128] copy(%p), {mlp}, {cycles(int(1.6 * V5P_CYCLES))}",
        f"  %v = f32[8,128] copy(%p), {attention}, {cycles(int(1.4 * V5P_CYCLES))}",
        f'  %k = f32[8,128] custom-call(%p), custom_call_target="tpu_custom_call", {attention}',
    )
    assert time.parts["kernels"] == 1.0
    assert time.bound_by == "computing in mlp"


def test_what_has_no_time_is_named_beside_the_step():
    _, time = of_text(
        f"  %w = f32[8,128] copy(%p), {cycles(V5P_CYCLES)}",
        '  %odd.3 = f32[8,128] custom-call(%p), custom_call_target="tpu_custom_call"',
        "  %sort.1 = f32[8,128] sort(%p), dimensions={1}",
    )
    assert time.incomplete == ("odd", "sort")
    assert report_time.to_json(time)["estimate"]["incomplete"] == ["odd", "sort"]
    assert "without      odd, sort: no time is known" in "\n".join(report_time.lines(time))
