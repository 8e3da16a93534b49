"""Text of compiled programs: instructions, shapes and trip counts, on texts small enough to read."""

import pytest

from t5x_like.planner import hlo

LOOP = """HloModule jit_f, is_scheduled=true

%body (state: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {
  %one = s32[]{:T(128)} constant(STEP)
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %limit = s32[]{:T(128)} get-tuple-element(%state), index=2
  ROOT %tuple = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %x, %limit)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %compare.fused = pred[]{:T(512)} compare(%a, %b), direction=DIRECTION
}

%condition (state.1: (s32[], f32[8,128], s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=2
  ROOT %compare = pred[]{:T(512)} fusion(%i.1, %limit.1), kind=kLoop, calls=%less
}

ENTRY %main (p: f32[8,128], n: s32[]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %start = s32[]{:T(128)} constant(START)
  %copy = s32[]{:T(128)} copy(%start)
  %limit.2 = s32[]{:T(128)} constant(LIMIT)
  %init = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%copy, %p, %END)
  %while = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=1
}
"""


def trips(*, start, limit, step, direction, end="limit.2", config="", text=LOOP):
    text = text.replace("DIRECTION", direction).replace("END", end)
    text = text.replace("START", str(start)).replace("LIMIT", str(limit)).replace("STEP", str(step))
    module = hlo.parse(text.replace("body=%body", f"body=%body{config}"))
    entry = module.computations[module.entry]
    found = hlo.trips(module, entry, entry.instructions["while"], [])
    return found and (found.count if found.exact else ("at most", found.count))


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction", "expected"),
    [
        (0, 12, 1, "LT", 12),
        (0, 12, 5, "LT", 3),
        (2, 12, 1, "LE", 11),
        (12, 0, -1, "GT", 12),
        (11, 0, -1, "GE", 12),
        (0, 12, 3, "NE", 4),
        (7, 7, 1, "LT", 0),
        (0, 12, 0, "LT", None),  # never ends
        (0, 12, 5, "NE", None),  # steps over its end
    ],
)
def test_trip_count_follows_start_step_and_end(start, limit, step, direction, expected):
    assert trips(start=start, limit=limit, step=step, direction=direction) == expected


def test_a_loop_whose_end_is_data_has_no_trip_count():
    assert trips(start=0, limit=0, step=1, direction="LT", end="n") is None


# Of a loop that goes on until all rows have ended, at most LIMIT times: as one fusion, and in two instructions.
ENDED = {
    "one fusion": """%less (a: s32[], b: s32[], ended: pred[8]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %ended = pred[8]{0} parameter(2)
  %true = pred[] constant(true)
  %all = pred[] reduce(%ended, %true), dimensions={0}, to_apply=%and_of
  %going = pred[] not(%all)
  %compare.fused = pred[]{:T(512)} compare(%a, %b), direction=DIRECTION
  ROOT %both = pred[] and(%compare.fused, %going)
}""",
    "a parameter": """%less (a: s32[], b: s32[], ended: pred[8]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %ended = pred[8]{0} parameter(2)
  %compare.inner = pred[]{:T(512)} compare(%a, %b), direction=DIRECTION
  ROOT %second = pred[] fusion(%ended, %compare.inner), kind=kLoop, calls=%both
}

%both (e: pred[8], c: pred[]) -> pred[] {
  %e = pred[8]{0} parameter(0)
  %c = pred[] parameter(1)
  %true = pred[] constant(true)
  %all = pred[] reduce(%e, %true), dimensions={0}, to_apply=%and_of
  %going = pred[] not(%all)
  ROOT %and = pred[] and(%going, %c)
}""",
}


@pytest.mark.parametrize("form", ENDED)
@pytest.mark.parametrize(("end", "expected"), [("limit.2", ("at most", 12)), ("n", None)])
def test_a_loop_that_data_may_end_before_has_its_limit(form, end, expected):
    start, _, rest = LOOP.partition("%less (")
    text = start + ENDED[form] + rest[rest.index("\n}") + 2 :]
    text = text.replace("fusion(%i.1, %limit.1)", "fusion(%i.1, %limit.1, %ended.1)").replace(
        "  ROOT %compare = pred", "  %ended.1 = pred[8]{0} custom-call(%state.1)\n  ROOT %compare = pred"
    )
    assert trips(start=0, limit=12, step=1, direction="LT", end=end, text=text) == expected


def test_a_trip_count_that_the_compiler_wrote_is_taken():
    config = ', backend_config={"known_trip_count":{"n":"9"}}'
    assert trips(start=0, limit=12, step=1, direction="LT", config=config) == 9


def test_only_values_that_a_loop_never_changes_are_known_inside_it():
    text = LOOP.replace("END", "limit.2").replace("DIRECTION", "LT").replace("START", "0").replace("LIMIT", "12")
    module = hlo.parse(text.replace("STEP", "1"))
    entry = module.computations[module.entry]
    assert hlo.loop_arguments(module, entry, entry.instructions["while"], []) == [[None, None, 12]]


KERNEL = """HloModule jit_g

%called (a: f32[8,128]) -> f32[8,128] {
  ROOT %a = f32[8,128]{1,0:T(8,128)} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %kernel = (f32[4,128]{1,0}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) custom-call(%p, /*index=1*/%p), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 512, \\"odd\\": \\")\\"}"
}}, metadata={op_name="jit(g)/kernel (1)"}
  ROOT %out = f32[8,128]{1,0:T(8,128)} copy(p), metadata={op_name="a ) b"}
}
"""


def test_attributes_over_several_lines_belong_to_their_instruction():
    module = hlo.parse(KERNEL)
    entry = module.computations[module.entry]
    assert list(entry.instructions) == ["p", "kernel", "out"]
    assert entry.root == "out"
    kernel = entry.instructions["kernel"]
    assert kernel.operands == ("p", "p")
    assert 'op_name="jit(g)/kernel (1)"' in kernel.attributes


def test_computations_of_other_threads_end_where_they_end():
    assert set(hlo.parse(KERNEL).computations) == {"called", "main"}


def test_names_without_a_percent_sign_are_read_too():
    assert hlo.parse(KERNEL).computations["main"].instructions["out"].operands == ("p",)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse("digraph {}\n")


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("bf16[4,128]{1,0:T(8,128)(2,1)S(1)}", (1024,)),
        ("(s32[], /*index=1*/pred[3]{0}, u32[]{:S(2)})", (4, 3, 4)),
        ("f8e4m3fn[16]", (16,)),
        ("s4[5]", (3,)),
        ("c64[2]", (16,)),
        ("f32[<=8,2]", (64,)),
    ],
)
def test_array_bytes_counts_every_array_of_a_shape(shape, sizes):
    assert hlo.array_bytes(shape) == sizes


def test_an_element_of_a_tuple_may_be_named_by_its_place():
    text = (
        "HloModule m\n\nENTRY %main (p: (f32[4], s32[])) -> f32[4] {\n"
        "  %p = (f32[4]{0}, /*index=1*/s32[]) parameter(0)\n"
        '  %c = s32[] copy(%p#1)\n  ROOT %sum = f32[4]{0} add(%p#0, %p#0), metadata={op_name="a#1"}\n}\n'
    )
    entry = hlo.parse(text).computations["main"]
    assert list(entry.instructions) == ["p", "p#1", "c", "p#0", "sum"]
    element = entry.instructions["p#1"]
    assert (element.opcode, element.shape, element.operands) == ("get-tuple-element", "s32[]", ("p",))
    assert entry.instructions["sum"].operands == ("p#0", "p#0")
