"""Operations become regions and passes by their names, those without a name by their neighbours; FLOPs of products."""

import random

import pytest

from t5x_like.core import accelerators
from t5x_like.planner import hlo
from t5x_like.planner.time import estimate, products, regions
from t5x_like.planner.time.cost import cost
from tests.planner.programs import by_region, computation, cycles, module, named
from tests.planner.test_cost import A, P, loop_body, loop_condition, run_loop

MESH = {"data": 2, "fsdp": 2}
F = computation("f", A, "  ROOT %m = f32[8,128] multiply(%a, %a)")


@pytest.mark.parametrize(
    ("source", "region", "which"),
    [
        ("jit(step)/jvp(loss)/layers/while/body/attention/dot_general", "attention", "forward"),
        ("jit(step)/jvp(layers)/while/body/eval_jaxpr/mlp/mul", "mlp", "forward"),
        (
            "jit(step)/transpose(jvp(loss))/layers/while/body/checkpoint/rematted_computation/mlp/mul",
            "mlp",
            "recomputed",
        ),
        ("jit(step)/transpose(jvp(loss))/layers/while/body/checkpoint/mlp/mul", "mlp", "backward"),
        ("jit(step)/jvp(loss)/layers/while/body/jit(dynamic_index_in_dim)/dynamic_slice", "layers", "forward"),
        ("jit(step)/transpose(jvp(loss))/embed/scatter-add", "embedding", "backward"),
        ("jit(step)/jvp(loss)/decoder/layers/while/body/cross/dot_general", "cross attention", "forward"),
        ("jit(step)/jvp(loss)/shard_map/while/body/dot_general", "head and loss", "forward"),
        ("jit(step)/optimizer/jit(_where)/select_n", "optimizer", "update"),
        ("jit(decode_step)/layers/while/body/attention/dot_general", "attention", "forward"),
        ("jit(decode_step)/head/dot_general", "head and loss", "forward"),
        ("jit(step)/iota", "rest", ""),
        ("", "rest", ""),
    ],
)
def test_a_name_says_region_and_pass(source, region, which):
    assert regions.classify(source) == (region, which)


def test_cycles_of_a_region_count_as_often_as_its_loop_runs():
    mlp, attention = (named(f"jit(s)/jvp(loss)/layers/{branch}/mul") for branch in ("mlp", "attention"))
    body = loop_body(
        "body",
        f"  %w = f32[8,128] fusion(%x), kind=kLoop, calls=%f, {mlp}, {cycles(7)}",
        f"  %y = f32[8,128] fusion(%w), kind=kLoop, calls=%f, {attention}, {cycles(2)}",
    )
    update = f"  %u = f32[8,128] fusion(%p), kind=kLoop, calls=%f, {named('jit(s)/optimizer/add')}, {cycles(11)}"
    main = "\n".join([P, *run_loop("l", "body", "p"), update])
    found = cost(module(main, F + body + loop_condition("c.l", 5)), MESH)
    assert by_region(found.schedule) == {
        ("mlp", "forward"): 35,
        ("optimizer", "update"): 11,
        ("attention", "forward"): 10,
    }
    assert sum(by_region(found.schedule).values()) == found.cycles


def test_what_has_no_name_belongs_to_what_uses_it_or_else_to_what_it_uses():
    main = [
        P,
        f"  %hoisted = f32[8,128] convert(%p), {cycles(3)}",
        "  %t = (f32[8,128]) tuple(%hoisted)",
        "  %g = f32[8,128] get-tuple-element(%t), index=0",
        f"  %used = f32[8,128] fusion(%g), kind=kLoop, calls=%f, {named('jit(s)/jvp(loss)/mlp/mul')}, {cycles(5)}",
        f"  %argument = f32[8,128] copy(%used), {named('state[params]')}, {cycles(20)}",
    ]
    found = cost(module("\n".join(main), F), MESH)
    assert by_region(found.schedule) == {("mlp", "forward"): 28}


def test_a_fusion_without_a_name_has_that_of_what_is_in_it():
    fused = computation(
        "g", A, f"  ROOT %m = f32[8,128] multiply(%a, %a), {named('jit(s)/transpose(jvp(loss))/embed/mul')}"
    )
    found = cost(module(f"{P}\n  %u = f32[8,128] fusion(%p), kind=kLoop, calls=%g, {cycles(4)}", fused), MESH)
    assert by_region(found.schedule) == {("embedding", "backward"): 4}


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # [8,16] x [16,32]
        ("%c = f32[8,32] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ("%c = f32[8,32] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 16 * 32),
    ],
)
def test_products_have_two_flops_a_multiply_add(line, flops):
    text = f"""HloModule m
ENTRY %main (a: bf16[8,16], b: bf16[16,32]) -> f32[8,32] {{
  %a = bf16[8,16] parameter(0)
  %b = bf16[16,32] parameter(1)
  ROOT {line}
}}
"""
    parsed = hlo.parse(text)
    main = parsed.computations["main"]
    assert products.flops(parsed, main.instructions["c"], main) == {"": flops}


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (("s8", "s8"), "integers"),
        (("u8", "s8"), "integers"),
        (("f8e4m3fn", "f8e5m2"), "floats"),
        (("s8", "bf16"), ""),
        (("s8", "f8e4m3fn"), ""),
    ],
)
def test_products_of_eight_bits_are_told_apart_and_faster_where_the_generation_says_so(kinds, name):
    """Half of their FLOPs count on v5p for integers, on Ironwood for floats, and on v4 for neither."""
    text = f"""HloModule m
ENTRY %main (a: {kinds[0]}[8,16], b: {kinds[1]}[16,32]) -> f32[8,32] {{
  %a = {kinds[0]}[8,16] parameter(0)
  %b = {kinds[1]}[16,32] parameter(1)
  ROOT %c = f32[8,32] convolution(%a, %b), dim_labels=bf_io->bf, {cycles(1)}
}}
"""
    main = (parsed := hlo.parse(text)).computations["main"]
    total = 2 * 8 * 16 * 32
    assert products.flops(parsed, main.instructions["c"], main) == {name: total}
    ((op, _),) = cost(text, {"fsdp": 1}).schedule.each()
    counted = {place: estimate._flops(op, accelerators.GENERATIONS[place]) for place in ("v4", "v5p", "v6e", "tpu7x")}
    fast = {"integers": ("v5p", "v6e"), "floats": ("tpu7x",), "": ()}[name]
    assert op.flops == total and counted == {place: total // (1 + (place in fast)) for place in counted}


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        # [4, 8, 16] x [16, 32] with a dim of rows written as a spatial one.
        (
            ("bf16[4,8,16]", "bf16[1,16,32]", "f32[4,8,32]"),
            "window={size=1}, dim_labels=0bf_0io->0bf",
            2 * 4 * 8 * 16 * 32,
        ),
        # Contraction over a spatial dim of 4 and a feature dim of 16.
        (("bf16[4,8,16]", "bf16[4,16,32]", "f32[1,8,32]"), "window={size=4}, dim_labels=0bf_0io->0bf", 2 * 8 * 64 * 32),
        # 6 products side by side, as a compiler writes a batch of products: dilated, so that each meets its own.
        (
            ("bf16[6,8,16]", "bf16[6,16,32]", "f32[6,8,32]"),
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            6 * 2 * 8 * 16 * 32,
        ),
    ],
)
def test_a_products_spatial_dims_count_where_they_meet_the_input(shapes, attributes, flops):
    left, right, out = shapes
    text = f"""HloModule m
ENTRY %main (a: {left}, b: {right}) -> {out} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %c = {out} convolution(%a, %b), {attributes}
}}
"""
    parsed = hlo.parse(text)
    main = parsed.computations["main"]
    assert products.flops(parsed, main.instructions["c"], main) == {"": flops}


def test_what_a_window_touches_is_counted_as_one_by_one():
    draw = random.Random(0)
    for _ in range(300):
        length, size, out = (draw.randint(1, 9) for _ in range(3))
        low, stride, gap, step = draw.randint(-3, 5), draw.randint(1, 5), draw.randint(1, 6), draw.randint(1, 4)
        places = [number * stride - low + w * step for number in range(out) for w in range(size)]
        expected = sum(0 <= place <= (length - 1) * gap and place % gap == 0 for place in places)
        fields = {"pad": f"{low}_0", "stride": str(stride), "lhs_dilate": str(gap), "rhs_dilate": str(step)}
        assert products._touched(length, size, out, fields) == expected, (length, size, out, fields)


def test_rows_that_a_compiler_writes_as_a_window_take_no_room():
    fields = {"stride": "999999", "lhs_dilate": "1000000"}
    assert products._touched(10**6, 10**6, 10**6, fields) == 10**6
