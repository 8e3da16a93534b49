"""Points, their names, and how flags and files say them."""

import math
import re

import numpy as np
import pytest
from scipy.stats import qmc

from launch.sweeps import points, reading
from launch.sweeps.members import NAME_LENGTH, Member, members
from t5x_like.core.errors import UsageError

RATE, DROPOUT, WIDTH = "config.optim.learning_rate", "config.model.dropout", "config.model.width"
TEST = ["--config=configs/pretrain/test.py"]


def test_the_combinators_give_the_points_that_their_names_say():
    one, two = points.values(RATE, [1e-3, 1e-2]), points.seeds(2)
    seed = points.SEED
    assert points.product(one, two) == [{RATE: r, seed: s} for r in (1e-3, 1e-2) for s in (0, 1)]
    assert points.zipped(one, two) == [{RATE: 1e-3, seed: 0}, {RATE: 1e-2, seed: 1}]
    assert points.chain(one, two) == [{RATE: 1e-3}, {RATE: 1e-2}, {seed: 0}, {seed: 1}]
    assert points.product() == [{}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: points.zipped(points.seeds(2), points.values(RATE, [1])), "2 and 1 points cannot be zipped"),
        (lambda: points.product(points.seeds(2), points.seeds(3)), "config.seed is given twice"),
        (lambda: points.uniform(2, 1), "lower end below"),
        (lambda: points.log_uniform(0, 1), "lower end above 0"),
        (lambda: points.integers(0, 1.5), "whole numbers"),
        (lambda: points.choice(), "something to choose"),
        (lambda: points.drawn(3, {RATE: points.choice(1, 2)}), "only 2 different points of the 3"),
        (lambda: points.sobol(3, {}), "at least one field"),
    ],
)
def test_a_wrong_combination_is_one_line(make, message):
    with pytest.raises(UsageError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_drawn_points_are_fixed_by_their_seed_and_fill_their_range():
    fields = {RATE: points.log_uniform(1e-4, 1e-2), WIDTH: points.integers(1, 4), DROPOUT: points.uniform(0, 0.5)}
    found = points.drawn(200, fields, seed=3)
    # Written down: a sweep that is resumed by another version must find its members again.
    assert found[:2] == [
        {RATE: 0.0002992, WIDTH: 3, DROPOUT: 0.185},
        {RATE: 0.001614, WIDTH: 3, DROPOUT: 0.03276},
    ]
    assert points.drawn(5, fields, seed=3) == found[:5] != points.drawn(5, fields, seed=4)
    logs = [math.log10(point[RATE]) for point in found]
    assert min(logs) >= -4 and max(logs) <= -2 and abs(sum(log < -3 for log in logs) - 100) < 25
    assert {point[WIDTH] for point in found} == {1, 2, 3, 4}


def test_sobol_points_are_more_even_than_random_ones_and_those_of_the_reference():
    fields = {name: points.uniform(0, 1) for name in (RATE, DROPOUT)}
    even, random = points.sobol(64, fields), points.drawn(64, fields)

    def discrepancy(found):
        return qmc.discrepancy(np.array([list(point.values()) for point in found]))

    assert discrepancy(even) < 0.3 * discrepancy(random)
    # A digital shift keeps one point in each of the 64 boxes of 8 x 8.
    assert len({tuple(int(8 * value) for value in point.values()) for point in even}) == 64
    assert points.sobol(64, fields, seed=1) != even == points.sobol(64, fields)
    assert points.sobol(3, fields) == even[:3]


def test_names_are_short_and_can_be_part_of_a_pod_name():
    found = members(
        [
            {RATE: 1e-3, points.SEED: 0},
            {RATE: 3.162e-4},
            {DROPOUT: 0.5, "config.optim.weight_decay": -2.0},
            {"config.optim.name": "Muon"},
            {"config.loop.ema_decay": None, "config.model.head.tied": True},
            {"config.data.source": "text:~/some/folder/with/a/long/name.txt"},
            {"config.data.source": "text:~/some/folder/with/a/long/name.txt.gz"},
            {"config.a.b_c": 1, "config.a.b_d": 2, "config.a.bath_count": 3},
            {"config.a.size": (8, 128)},
        ]
    )
    names = [member.name for member in found]
    assert names[:5] == ["lr-1e-3-seed-0", "lr-3p162e-4", "dropout-0p5-wd-m2", "name-muon", "ed-none-tied-true"]
    assert names[7:] == ["b-c-1-b-d-2-bath-count-3", "size-8-128"]
    assert len({*names}) == len(names)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= NAME_LENGTH for name in names)


def test_a_sweep_that_grows_keeps_the_names_of_its_members():
    before = members(points.values("config.optim.name", ["a_b", "a-b"]))
    assert [member.name for member in before][0] == "name-a-b" != before[1].name
    after = members(points.values("config.optim.name", ["new", "a-b", "a_b"]), before)
    assert after[:2] == before and after[2].name == "name-new"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ([], "the sweep is empty"),
        ([{"optim.learning_rate": 1}], "write 'config.optim.learning_rate'"),
        ([{RATE: 1}, {RATE: 2}, {RATE: 1.0}], f"two members with equal points: {RATE}=1;"),
        ([{}], "a point is a dict"),
        ([{RATE: {"a": 1}}], "should be a number, a text"),
        ([{RATE: math.nan}], "should be finite"),
    ],
)
def test_points_that_are_none_are_one_line(sweep, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        members(sweep)


def test_the_overrides_of_a_point_say_its_values():
    point = members([{RATE: np.float64(0.001), "config.a": (1, 2), "config.b": None, "config.c": True}])[0]
    assert point.overrides == [f"--{RATE}=0.001", "--config.a=(1, 2)", "--config.b=None", "--config.c=True"]
    assert Member("n", {RATE: 0.1}).described == f"the member n ({RATE}=0.1)"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["config.a=1e-3,bytes,(1, 2)"], [{"config.a": 0.001}, {"config.a": "bytes"}, {"config.a": (1, 2)}]),
        (["config.a=1,2", "config.b=3"], [{"config.a": 1, "config.b": 3}, {"config.a": 2, "config.b": 3}]),
        (
            ["config.a=1,2", "config.b=3,4", "combine=zip"],
            [{"config.a": 1, "config.b": 3}, {"config.a": 2, "config.b": 4}],
        ),
        (["config.a=1", "config.b=3", "combine=chain"], [{"config.a": 1}, {"config.b": 3}]),
        (["seeds=2"], points.seeds(2)),
        (["config.a=uniform(0, 1)", "points=4", "seed=2"], points.drawn(4, {"config.a": points.uniform(0, 1)}, seed=2)),
        (["config.a=uniform(0, 1)", "points=4", "draw=sobol"], points.sobol(4, {"config.a": points.uniform(0, 1)})),
    ],
)
def test_flags_describe_a_sweep(given, expected):
    assert reading.read(TEST, [f"--sweep.{each}" for each in given]) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to sweep: --config=configs/pretrain/test.py has no function sweep"),
        (["config.a="], "--sweep.config.a= needs a value"),
        (["config.a=1", "config.a=2"], "config.a is given twice"),
        (["config.a=uniform(1)"], "missing 1 required positional argument"),
        (["config.a=normal(0, 1)"], "'normal' is unknown; did you mean 'uniform'?"),
        (["config.a=uniform(0, 1)"], "say how many points"),
        (["combine=zap"], "did you mean 'zip'?"),
        (["learning_rate=1"], "did you mean '--sweep.config.learning_rate'?"),
        (["points=0"], "at least 1"),
    ],
)
def test_a_wrong_flag_is_one_line(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        reading.read(TEST, [f"--sweep.{each}" for each in given])


def test_a_config_file_adds_points_and_flags_multiply_them(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "from launch.sweeps import points\n\n"
        "def sweep(add):\n"
        "    add(**{'config.a': 1})\n"
        "    add(*points.values('config.b', [2, 3]))\n"
    )
    assert reading.read([f"--config={path}"], []) == [{"config.a": 1}, {"config.b": 2}, {"config.b": 3}]
    assert len(reading.read([f"--config={path}"], ["--sweep.seeds=2"])) == 6
    path.write_text("def sweep(add):\n    pass\n")
    with pytest.raises(UsageError, match="the sweep is empty"):
        members(reading.read([f"--config={path}"], []))
