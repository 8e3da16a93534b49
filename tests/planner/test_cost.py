"""Adding up a program: trip counts, branches, pairs, chains, kernels, on modules that can be counted by hand."""

import time

from t5x_like.planner.time.cost import Kernel, Loop, cost

MESH = {"data": 2, "fsdp": 2}
CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'


def module(main, computations=""):
    return f"HloModule m\n{computations}\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n{main}\n}}\n"


def line(text, cycles=None):
    return f"  {text}" + (f", {CYCLES.format(cycles)}" if cycles is not None else "")


def computation(name, *lines):
    return "\n".join([f"%{name} (a: f32[8,128]) -> f32[8,128] {{", *lines, "}", ""])


P = line("%p = f32[8,128] parameter(0)")
A = line("%a = f32[8,128] parameter(0)")


def loop_condition(name, trips):
    return "\n".join(
        [
            f"%{name} (s: (s32[], f32[8,128])) -> pred[] {{",
            "  %s = (s32[], f32[8,128]) parameter(0)",
            "  %i = s32[] get-tuple-element(%s), index=0",
            f"  %n = s32[] constant({trips})",
            "  ROOT %lt = pred[] compare(%i, %n), direction=LT",
            "}",
            "",
        ]
    )


def loop_body(name, *work):
    return "\n".join(
        [
            f"%{name} (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{",
            "  %s = (s32[], f32[8,128]) parameter(0)",
            "  %i = s32[] get-tuple-element(%s), index=0",
            "  %one = s32[] constant(1)",
            "  %next = s32[] add(%i, %one)",
            "  %x = f32[8,128] get-tuple-element(%s), index=1",
            *work,
            "  ROOT %t = (s32[], f32[8,128]) tuple(%next, %y)",
            "}",
            "",
        ]
    )


def run_loop(name, body, source):
    return [
        f"  %zero.{name} = s32[] constant(0)",
        f"  %init.{name} = (s32[], f32[8,128]) tuple(%zero.{name}, %{source})",
        f"  %while.{name} = (s32[], f32[8,128]) while(%init.{name}), condition=%c.{name}, body=%{body}",
    ]


def test_bodies_of_nested_loops_count_as_often_as_both_run():
    inner = loop_body("inner", line("%y = f32[8,128] fusion(%x), kind=kLoop, calls=%f", 10))
    outer = loop_body(
        "outer",
        line("%once = f32[8,128] fusion(%x), kind=kLoop, calls=%f", 1000),
        *run_loop("in", "inner", "x"),
        line("%y = f32[8,128] get-tuple-element(%while.in), index=1"),
    )
    computations = (
        computation("f", A, line("ROOT %m = f32[8,128] multiply(%a, %a)", 7))
        + inner
        + outer
        + loop_condition("c.in", 3)
        + loop_condition("c.out", 5)
    )
    found = cost(module("\n".join([P, *run_loop("out", "outer", "p")]), computations), MESH)
    assert found.cycles == 5 * (1000 + 3 * 10)  # and not the 7 inside the fusion, which the fusion's own include
    assert found.unknown_loops == ()


def test_a_conditional_counts_its_dearer_branch():
    cheap = computation("cheap", A, line("ROOT %x = f32[8,128] add(%a, %a)", 10))
    dear = computation(
        "dear",
        A,
        line("%r = f32[8,128] all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add"),
        line("ROOT %x = f32[8,128] add(%r, %r)", 400),
    )
    branches = "branch_computations={%cheap, %dear}"
    found = cost(module(f"{P}\n  %c = f32[8,128] conditional(%i, %p, %p), {branches}", cheap + dear), MESH)
    assert found.cycles == 400
    assert [(item.kind, item.axes) for item in found.collectives] == [("all-reduce", ("fsdp",))]


def test_of_a_conditionals_branches_one_with_a_kernel_is_dearer_than_any_cycles():
    """The compiler gives kernels none, and they are the longest work that there is."""
    call = '  ROOT %splash.1 = f32[8,128] custom-call(%a), custom_call_target="tpu_custom_call"'
    branches = computation("kernel", A, call) + computation("fill", A, line("ROOT %y = f32[8,128] copy(%a)", 10))
    for order in ("%kernel, %fill", "%fill, %kernel"):
        main = [P, f"  ROOT %c = f32[8,128] conditional(%i, %p, %p), branch_computations={{{order}}}"]
        found = cost(module("\n".join(main), branches), {"fsdp": 2})
        assert [kernel.name for kernel in found.kernels] == ["splash"] and found.cycles == 0


def test_what_is_sent_and_not_answered_here_is_named():
    """To the host, or to another slice by a runtime that waits for it elsewhere."""
    attributes = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    main = [
        f"  %sd = (f32[8,128], u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, {attributes}",
        "  %x = token[] send-done(%sd), channel_id=2, is_host_transfer=true",
        "  %rv = (f32[8,128], u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true",
        "  ROOT %y = (f32[8,128], token[]) recv-done(%rv), channel_id=3, is_host_transfer=true",
    ]
    found = cost(module("\n".join([P, *main])), {"slice": 2, "fsdp": 2})
    assert found.without_estimate == {"send": 1, "recv": 1}
    assert found.collectives == ()


def test_start_and_done_are_one_collective():
    main = [
        P,
        line("%s = (f32[8,128], f32[16,128]) all-gather-start(%p), replica_groups={{0,2},{1,3}}, dimensions={0}"),
        line("%d = f32[16,128] all-gather-done(%s)"),
    ]
    (found,) = cost(module("\n".join(main)), MESH).collectives
    assert (found.kind, found.axes, found.count, found.bytes_each) == ("all-gather", ("data",), 1, 16 * 128 * 4)


def test_a_wrapped_collective_is_found_in_the_computation_that_wraps_it():
    wrapped = computation(
        "wrapped", A, line("ROOT %s = f32[4,128] reduce-scatter(%a), replica_groups={{0,1},{2,3}}, to_apply=%add")
    )
    main = [
        P,
        line("%s = ((f32[8,128]), f32[4,128], s32[]) async-start(%p), calls=%wrapped"),
        line("%u = ((f32[8,128]), f32[4,128], s32[]) async-update(%s)"),
        line("%d = f32[4,128] async-done(%u)"),
    ]
    (found,) = cost(module("\n".join(main), wrapped), MESH).collectives
    assert (found.kind, found.count, found.bytes_each) == ("reduce-scatter", 1, 8 * 128 * 4)


def test_a_collective_that_several_fusions_advance_counts_once_a_loop_turn():
    gather = '{} = f32[16,128] all-gather(%a), channel_id=11, replica_groups={{{{0,2}},{{1,3}}}}, \
frontend_attributes={{chain_id="0"}}'
    fused = "".join(
        computation(name, A, line(gather.format(f"%g.{name}")), line("ROOT %x = f32[8,128] add(%a, %a)"))
        for name in ("begin", "advance", "end")
    )
    body = loop_body(
        "body",
        line("%b = f32[8,128] fusion(%x), kind=kCustom, calls=%begin"),
        line("%w = f32[8,128] fusion(%b), kind=kOutput, calls=%advance", 100),
        line("%y = f32[8,128] fusion(%w), kind=kCustom, calls=%end"),
    )
    main = "\n".join([P, *run_loop("l", "body", "p")])
    found = cost(module(main, fused + body + loop_condition("c.l", 6)), MESH)
    assert [(item.kind, item.count) for item in found.collectives] == [("all-gather", 6)]
    assert found.cycles == 600
    assert found.without_estimate == {}


def test_a_fused_all_reduce_of_which_each_device_keeps_a_slice_is_a_reduce_scatter():
    fused = computation(
        "scatter",
        A,
        line("%r = f32[8,128] all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add"),
        line("%i = s32[] constant(0)"),
        line("ROOT %x = f32[4,128] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,128}"),
    )
    (found,) = cost(module(f"{P}\n  %f = f32[4,128] fusion(%p), kind=kCustom, calls=%scatter", fused), MESH).collectives
    assert (found.kind, found.bytes_each) == ("reduce-scatter", 8 * 128 * 4)


def test_kernels_are_listed_and_bear_no_cycles():
    target = 'custom_call_target="tpu_custom_call"'
    body = loop_body(
        "body", line(f"%splash.12 = f32[8,128] custom-call(%x), {target}"), line("%y = f32[8,128] copy(%x)", 5)
    )
    main = [P, line('%b = f32[8,128] custom-call(), custom_call_target="AllocateBuffer"'), *run_loop("l", "body", "p")]
    found = cost(module("\n".join(main), body + loop_condition("c.l", 4)), MESH)
    assert found.kernels == (Kernel("splash", 4),)
    assert found.cycles == 20


def test_work_without_an_estimate_is_named_and_the_largest_number_is_none():
    main = [
        P,
        line("%sort.1 = f32[8,128] sort(%p), dimensions={0}"),
        line("%gather_fusion.2 = f32[8,128] fusion(%p), kind=kCustom, calls=%f", 2**63 - 1),
    ]
    found = cost(module("\n".join(main), computation("f", A)), MESH)
    assert found.cycles == 0
    assert found.without_estimate == {"sort": 1, "gather_fusion": 1}


def test_what_another_core_does_costs_this_one_nothing():
    called = computation("offloaded", A, line("ROOT %x = f32[8,128] add(%a, %a)", 50))
    start = '%s = f32[8,128] call-start(%p), async_execution_thread="sparsecore", to_apply=%offloaded'
    found = cost(module(f"{P}\n  {start}\n  %d = f32[8,128] call-done(%s)", called), MESH)
    assert found.cycles == 0


def test_what_this_core_does_beside_counts_with_its_kernels_and_products():
    """A product of [8, 128] x [128, 128], a kernel, and a collective that is in flight meanwhile and counts once."""
    called = computation(
        "beside",
        A,
        line("%w = f32[128,128] constant({...})"),
        line("%c = f32[8,128] convolution(%a, %w), dim_labels=bf_io->bf", 50),
        '  %splash.1 = f32[8,128] custom-call(%c), custom_call_target="tpu_custom_call"',
        line("ROOT %r = f32[8,128] all-reduce(%splash.1), replica_groups={{0,1},{2,3}}, to_apply=%add"),
    )
    main = [P, "  %s = f32[8,128] call-start(%p), to_apply=%beside", "  %d = f32[8,128] call-done(%s)"]
    found = cost(module("\n".join(main), called), MESH)
    assert found.cycles == 50 and [kernel.name for kernel in found.kernels] == ["splash"]
    assert sum(op.flops * times for op, times in found.schedule.each()) == 2 * 8 * 128 * 128
    assert [(item.kind, item.count) for item in found.collectives] == [("all-reduce", 1)]


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    body = loop_body("body", line("%y = f32[8,128] copy(%x)", 5))
    condition = loop_condition("c.l", 4).replace("%n = s32[] constant(4)", "%n = s32[] get-tuple-element(%s), index=1")
    found = cost(module("\n".join([P, *run_loop("l", "body", "p")]), body + condition), MESH)
    assert found.cycles == 5
    assert found.unknown_loops == ("while.l",)


def test_a_loop_that_data_may_end_counts_at_its_limit_with_what_its_condition_asks():
    """Decoding: at most 4 tokens, and before each of them all devices are asked whether their rows go on."""
    body = loop_body("body", line("%y = f32[8,128] copy(%x)", 5))
    asked = """  %x = f32[8,128] get-tuple-element(%s), index=1
  %left = f32[] all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %zero = f32[] constant(0)
  %some = pred[] compare(%left, %zero), direction=GT
  %lt = pred[] compare(%i, %n), direction=LT
  ROOT %both = pred[] and(%lt, %some)"""
    counted = "  ROOT %lt = pred[] compare(%i, %n), direction=LT"
    condition = loop_condition("c.l", 4)
    assert counted in condition
    found = cost(module("\n".join([P, *run_loop("l", "body", "p")]), body + condition.replace(counted, asked)), MESH)
    assert found.limited_loops == (Loop("while.l", 4, 20),)
    assert (found.cycles, found.unknown_loops) == (20, ())
    assert [(item.kind, item.count) for item in found.collectives] == [("all-reduce", 5)]


def test_what_was_begun_outside_its_computation_ends_with_nothing_known():
    """The `-start` is passed through a call: its `-done` waits for a parameter."""
    called = computation("inside", A, line("ROOT %done.1 = f32[8,128] copy-done(%a)"))
    found = cost(module("\n".join([P, line("ROOT %c = f32[8,128] call(%p), to_apply=%inside")]), called), MESH)
    assert found.cycles == 0


def test_loops_with_much_state_are_read_as_fast_as_those_with_little():
    """Three loops, one in the other: what an array of their state is, is never asked of the loops inside."""
    arrays = 40
    state = "(" + ", ".join(["s32[]", *["bf16[8]"] * arrays]) + ")"
    parts = []
    for depth in range(3):
        inner = depth < 2
        lines = [f"%body{depth} (s: {state}) -> {state} {{", f"  %s = {state} parameter(0)"]
        lines += ["  %i = s32[] get-tuple-element(%s), index=0", "  %one = s32[] constant(1)"]
        lines += ["  %j = s32[] add(%i, %one)"]
        lines += [f"  %x{n} = bf16[8] get-tuple-element(%s), index={n + 1}" for n in range(arrays)]
        outs = [f"%x{n}" for n in range(arrays)]
        if inner:
            lines += ["  %zero = s32[] constant(0)", f"  %t = {state} tuple(%zero, {', '.join(outs)})"]
            lines.append(f"  %w = {state} while(%t), condition=%cond, body=%body{depth + 1}")
            lines += [f"  %y{n} = bf16[8] get-tuple-element(%w), index={n + 1}" for n in range(arrays)]
            outs = [f"%y{n}" for n in range(arrays)]
        lines += [f"  ROOT %o = {state} tuple(%j, {', '.join(outs)})", "}"]
        parts.append("\n".join(lines))
    condition = [f"%cond (s: {state}) -> pred[] {{", f"  %s = {state} parameter(0)"]
    condition += ["  %i = s32[] get-tuple-element(%s), index=0", "  %n = s32[] constant(5)"]
    condition += ["  ROOT %lt = pred[] compare(%i, %n), direction=LT", "}"]
    main = [f"  %p = {state} parameter(0)", f"  ROOT %w = {state} while(%p), condition=%cond, body=%body0"]
    main[1:1] = ["  %zero = s32[] constant(0)"]
    main[1:1] = [f"  %x{n} = bf16[8] get-tuple-element(%p), index={n + 1}" for n in range(arrays)]
    main[-1] = f"  %t = {state} tuple(%zero, {', '.join(f'%x{n}' for n in range(arrays))})\n" + main[-1].replace(
        "%p", "%t"
    )
    text = (
        "HloModule m\n" + "\n".join([*parts, *condition]) + "\nENTRY %main () -> f32[] {\n" + "\n".join(main) + "\n}\n"
    )
    begin = time.process_time()
    turns = [loop.turns for loop, _ in cost(text, MESH).schedule.loops()]
    assert turns == [5, 5, 5]
    assert time.process_time() - begin < 1
