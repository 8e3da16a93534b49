"""tools/calibrate from compiling a row's program to its estimate, on the smallest model that there is."""

import dataclasses

import pytest

from tools.calibrate import applying, compiling
from tools.calibrate.programs import Program

TINY = Program(
    name="tiny",
    model={"size": "tiny", "decoder.layers": 4},
    topology="v5e:2x2",
    batch=8,
    length=256,
    remat="q+k+v",
    mesh={"fsdp": 2, "tensor": 2},
)


@pytest.fixture(scope="module")
def kept(compiler, tmp_path_factory):
    where = tmp_path_factory.mktemp("kept")
    compiling.compile_and_keep(TINY, where)
    return compiling.read(TINY, where)


def test_what_is_kept_is_what_was_asked(kept):
    assert kept["asked"] == TINY.asked()
    assert (kept["mesh"]["fsdp"], kept["mesh"]["tensor"]) == (2, 2)
    assert sorted(kept["places"]) == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert kept["memory_bytes"] > 0


def test_an_estimate_counts_loops_over_layers_as_often_as_the_row_has_layers(kept):
    asis = applying.read(TINY, kept)
    deep = applying.read(dataclasses.replace(TINY, layers=40), kept)
    seconds = [each.estimate().step_seconds for each in (asis, deep)]
    assert 0 < seconds[0] < seconds[1] < 10 * seconds[0]
    forward = [sum(times for op, times in each.cost.schedule.each() if op.kernel) for each in (asis, deep)]
    assert forward[1] == 10 * forward[0] > 0
