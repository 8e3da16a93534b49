"""Calibration of the plan's time: the arithmetic of published rows, the fit, and estimates of kept programs."""

import dataclasses
import gzip
import json

import pytest

from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError
from t5x_like.planner.time.schedule import Block, Op
from tools.calibrate import __main__ as command
from tools.calibrate import applying, compiling, constants, fit, published, table
from tools.calibrate.programs import BY_NAME, PROGRAMS
from tools.calibrate.rows import CONVENTIONS, ROWS, SHAPES


def peak(row):
    return accelerators.GENERATIONS[row.chip].peak


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_figures_that_a_row_publishes_agree_in_its_convention(row):
    """Step time, tokens/s, TFLOP/s and MFU of a row are one speed, if the convention is read right."""
    assert row.source in ("maxtext", "recipes", "axlearn", "axlearn-paper")
    time, tokens = published.step_seconds(row), published.tokens_per_chip(row)
    if row.tokens:
        assert row.tokens * time == pytest.approx(tokens, rel=2e-3)
    if row.tflops:
        flops = published.flops_per_token(SHAPES[row.model], row.length, row.convention)
        assert row.tflops * 1e12 * time == pytest.approx(tokens * flops, rel=2e-3)
        if row.mfu:
            assert row.mfu == pytest.approx(row.tflops * 1e12 / peak(row), rel=5e-3)
    if row.convention == "parameters":
        assert published.mfu(row, time, "parameters") == pytest.approx(row.mfu, rel=1e-3)


def test_another_convention_would_be_seen():
    row = next(row for row in ROWS if row.name == "llama31-8b v6e 256")
    wrong = published.flops_per_token(SHAPES[row.model], row.length, "causal")
    assert row.tokens * wrong == pytest.approx(0.889 * row.tflops * 1e12, rel=1e-2)


@pytest.mark.parametrize(
    ("model", "length", "convention", "giga"),
    [
        # The reference's figures: 57.9 and 51.5 GFLOP a token of Llama 3.1 8B at 8k, 481 and 449 of 70B.
        ("Llama-3.1 8B", 8192, "full", 57.9),
        ("Llama-3.1 8B", 8192, "causal", 51.5),
        ("Llama-3.1 70B", 8192, "full", 481),
        ("Llama-3.1 70B", 8192, "causal", 449),
        ("Llama-3.1 70B", 131_072, "causal", 932),
        ("Llama-3.1 405B", 8192, "full", 2625),
        ("Llama-3.1 405B", 8192, "causal", 2524),
    ],
)
def test_flops_a_token_by_convention(model, length, convention, giga):
    assert published.flops_per_token(SHAPES[model], length, convention) / 1e9 == pytest.approx(giga, rel=2e-3)


def test_every_row_names_programs_of_its_size():
    assert set(CONVENTIONS) >= {row.convention for row in ROWS if row.convention}
    for row in ROWS:
        for name in row.programs:
            program = BY_NAME[name]
            asked = accelerators.parse(program.topology)
            assert (program.batch * program.one_of, program.length) == (row.batch, row.length), row.name
            assert asked.generation == row.chip
            assert asked.chips * program.slices * program.one_of == row.chips, row.name


OF_ROWS = [program for program in PROGRAMS if any(program.name in row.programs for row in ROWS)]


@pytest.mark.parametrize("program", OF_ROWS, ids=lambda program: program.name)
def test_programs_are_of_the_published_sizes(program):
    """What we plan has the FLOPs that the row's convention counts: the model is the same."""
    from t5x_like.models.flops import per_token

    model = compiling.experiment(program).model
    if program.layers:
        model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, layers=program.layers))
    row = next(row for row in ROWS if program.name in row.programs)
    mine = per_token(model, length=program.length)
    shape = SHAPES[row.model]
    assert 3 * (mine.weights + mine.head) == pytest.approx(6 * published.matrix_parameters(shape), rel=1e-3)
    if not any(shape.windows):  # ours counts a window as it is, and full attention as if there were none
        asked = published.flops_per_token(shape, row.length, "full")
        assert mine.unmasked.train == pytest.approx(asked, rel=1e-3)


def test_a_fit_finds_the_constants_that_made_the_times():
    made = {"work": 0.8, "link": 0.6}
    features = [(10.0, 1.0), (5.0, 4.0), (2.0, 6.0), (8.0, 0.1), (1.0, 1.0)]

    def seconds(row, values):
        work, sent = features[row]
        return work * values["work"] + max(0.0, sent / values["link"] - 1)  # not linear

    times = [seconds(row, made) for row in range(len(features))]
    asked = [fit.Constant("work", 1.0, 0.5, 1.5), fit.Constant("link", 0.9, 0.3, 1.0)]
    found = fit.fit(asked, times, seconds)
    assert found == pytest.approx(made, rel=0.02)
    assert max(map(abs, fit.errors(times, seconds, found))) < 0.02
    assert max(map(abs, fit.leave_one_out(asked, times, seconds))) < 0.03


def test_leaving_a_row_out_shows_the_row_that_is_unlike_the_others():
    times, factors = [1.0, 2.0, 3.0, 8.0], [1.0, 2.0, 3.0, 4.0]
    asked = [fit.Constant("share", 1.0, 0.1, 10.0)]

    def seconds(row, values):
        return factors[row] * values["share"]

    with_all = fit.errors(times, seconds, fit.fit(asked, times, seconds))
    without = fit.leave_one_out(asked, times, seconds)
    assert without[3] == pytest.approx(-0.5, abs=0.01)  # by the other three, whose share is 1
    assert abs(with_all[3]) < abs(without[3])


def test_constants_stay_within_their_bounds_and_are_put_back():
    asked = [fit.Constant("share", 0.9, 0.5, 1.0)]
    assert fit.fit(asked, [2.0], lambda row, values: values["share"]) == pytest.approx({"share": 1.0})
    before = constants.in_force()
    with constants.using({"EXPOSED_SHARE": 0.123}):
        assert constants.in_force()["EXPOSED_SHARE"] == 0.123
    assert constants.in_force() == before
    for constant in constants.CONSTANTS:
        assert constant.low <= before[constant.name] <= constant.high, constant.name


def loop(name, turns, *ops):
    return Block(1, (Block(turns, ops), Block(turns + 1, ())), name, turns)


def test_a_program_of_fewer_layers_counts_as_many_as_the_row_has():
    update = Op("u", "jit(step)/optimizer/mul", cycles=6)
    layer = Op("b", "jit(step)/jvp(layers)/while/body/mlp/mul", cycles=10)
    short = Block(1, (Op("a", "", cycles=7), loop("layers", 3, layer), loop("loss", 5), update))
    deep = applying.deepened(short, 3, 12)
    assert (short.cycles, deep.cycles) == (7 + 30 + 6, 7 + 120 + 24)
    assert [found.turns for found, _ in deep.loops()] == [12, 5]
    peeled = Block(1, (layer, loop("layers", 2, layer)))
    assert applying.deepened(peeled, 3, 12).cycles == 120
    one_of_two = Block(1, (loop("forward", 3, layer), layer, loop("backward", 2, layer), loop("loss", 2)))
    assert [found.turns for found, _ in applying.deepened(one_of_two, 3, 12).loops()] == [12, 11, 2]
    recomputed = "jit(step)/transpose(jvp(layers))/while/body/checkpoint/rematted_computation/attention/dot_general"
    spared = Block(1, (loop("layers", 3, Op("q", recomputed, cycles=10), Op("b", "", cycles=1)),))
    assert (applying.without(spared, ()).cycles, applying.without(spared, ("attention",)).cycles) == (33, 3)
    with pytest.raises(UsageError, match="no loop over 9 layers"):  # nor over 8
        applying.deepened(short, 9, 12)


TEXT = """HloModule made, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1750000000"}
  ROOT %r = f32[8]{0} all-reduce(%f), channel_id=1, replica_groups=[1,64]<=[64], to_apply=%add
}
"""


def keep(where, name, **changes):
    program = BY_NAME[name]
    asked = accelerators.parse(program.topology)
    axes = ("slice", "stage", "data", "fsdp", "expert", "sequence", "tensor")
    content = {
        "asked": program.asked(),
        "mesh": {axis: 1 for axis in axes} | {"fsdp": 16, "tensor": 4},
        "places": [[0, x, y, z, 0] for x in range(asked.dims[0]) for y in range(4) for z in range(4)],
        "text": TEXT,
    }
    compiling.path(program, where).write_bytes(gzip.compress(json.dumps(content | changes).encode()))


def test_the_table_shows_kept_programs_and_names_the_others(tmp_path, capsys):
    """1.75e9 cycles of no product are a second of v5p, at 1.75 GHz; a sum of 32 bytes takes no time."""
    keep(tmp_path, "max32b-v5p-64")
    assert command.main(["--table", "--kept", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = next(line for line in lines if line.startswith("| 32b v5p 64 "))
    seconds = 1.75e9 * 262_144 / 459e12
    assert f"| 7.3 | {seconds:.4g} |" in found
    assert sum("not planned" in line for line in lines) == len(ROWS) - 1
    assert lines[-3].startswith("In force: median error")
    assert lines[-1] == "Compiled at unknown (max32b-v5p-64)."
    keep(tmp_path, "max32b-v5p-64", commit="1a2b3c4")
    assert command.main(["--table", "--kept", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Compiled at 1a2b3c4 (max32b-v5p-64)."
    assert command.main(["--fit", "--kept", str(tmp_path)]) == 0
    assert "CYCLE_SHARE" in capsys.readouterr().out


def test_a_program_of_other_settings_is_not_read(tmp_path):
    keep(tmp_path, "max32b-v5p-64", asked={"batch": 1})
    assert compiling.read(BY_NAME["max32b-v5p-64"], tmp_path) is None
    with pytest.raises(UsageError, match="holds no program"):
        command.main(["--table", "--kept", str(tmp_path)])
    with pytest.raises(UsageError, match="did you mean"):
        command.main(["--compile", "max32b-v5p-6", "--kept", str(tmp_path)])


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"{}"), gzip.compress(b"[1]")])
def test_a_file_of_somebody_else_is_no_program(tmp_path, content):
    compiling.path(BY_NAME["max32b-v5p-64"], tmp_path).write_bytes(content)
    with pytest.raises(UsageError, match="holds no program"):
        command.main(["--table", "--kept", str(tmp_path)])


def test_what_is_compiled_where_nothing_is_named_belongs_to_a_row(tmp_path, monkeypatch):
    """Programs beside the rows, such as those with other options, are compiled by name."""
    asked = []
    monkeypatch.setattr(compiling, "compile_and_keep", lambda program, where: asked.append(program.name))
    assert command.main(["--compile", "--kept", str(tmp_path)]) == 0
    assert set(asked) == {name for row in ROWS for name in row.programs} and len(asked) == len(set(asked))
    for other in [name for name in BY_NAME if name not in asked]:
        assert command.main(["--compile", other, "--kept", str(tmp_path)]) == 0
        assert asked[-1] == other


def test_summary_of_errors():
    assert table.summary([-0.3, 0.1, 0.2]) == "median error 20%, largest 30%"
