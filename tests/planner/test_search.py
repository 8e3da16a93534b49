"""The logic of a search with a judge made up by the test: order, limits, what a refusal drops, what is kept."""

import argparse
import json

import pytest

from t5x_like import __version__
from t5x_like.commands import plan_search
from t5x_like.core.errors import UserError
from t5x_like.planner.search import index as search_index
from t5x_like.planner.search import report as search_report
from t5x_like.planner.search.course import Limits, Search, first_state, ranking, verdict
from t5x_like.planner.search.index import Entry, Verdict, opened
from t5x_like.planner.search.space import Point
from t5x_like.storage import manifest

HBM = 100
SETTINGS = {
    "arguments": ["--config=a"],
    "config": {"model": {"width": 8}},
    "topology": "v5e:2x2",
    "default_options": False,
    "versions": {"libtpu": "1"},
}
# name: (analytic seconds, analytic bytes, the judge's seconds, the judge's bytes; None: refused)
WORLD = {
    "fastest": (1.0, 108, None, None),
    "fast": (1.1, 90, 2.0, 95),
    "better": (1.2, 70, 1.5, 80),
    "larger": (1.3, 114, None, None),
    "slow": (3.0, 20, 4.0, 30),
}


def entries(world=WORLD):
    found = []
    for name, (seconds, size, _, _) in world.items():
        known = {"bytes": size, "seconds": seconds, "bound_by": "products"}
        state, said = first_state("", known, HBM)
        found.append(Entry(Point(name, {"config.name": name}), state, said, known))
    return found


def judged(seconds, size=50):
    return Verdict(seconds, size, "products", 0.5, 7)


def run(folder, *, points=9, confirm=0, world=WORLD, stop=None, confirmed=None):
    """(the search after its end, the names that were judged in order)."""
    search = Search(opened(str(folder), SETTINGS, entries(world)), Limits(points, confirm, HBM))
    asked = []
    while (name := search.following()) is not None:
        if len(asked) == stop:
            return search, asked
        asked.append(name)
        _, _, seconds, size = world[name]
        search.judged(name, judged(seconds, size)) if seconds else search.refused(name, "does not fit")
    while (name := search.following_to_confirm()) is not None:
        asked.append(f"{name} *")
        search.confirmed(name, (confirmed or {})[name])
    return search, asked


def test_points_are_judged_by_the_order_of_the_analytic_model_and_ranked_by_the_judge(tmp_path):
    search, asked = run(tmp_path)
    assert asked == ["fastest", "fast", "better", "slow"]
    assert [entry.name for entry in ranking(search.index)] == ["better", "fast", "slow"]
    assert search.best().name == "better"


def test_a_refusal_drops_what_is_clearly_larger_and_says_so(tmp_path):
    world = WORLD | {"fastest": (1.0, 100, None, None)}
    search, asked = run(tmp_path, world=world)
    assert "larger" not in asked
    assert search.index["larger"].state == search_index.LARGE
    assert "needs more than fastest, which the compiler refuses" in search.index["larger"].said


def test_no_more_points_are_judged_than_asked_for_and_the_rest_says_why(tmp_path):
    search, asked = run(tmp_path, points=3)
    assert len(asked) == 3
    text = search_report.to_markdown(search.index, HBM)
    assert "`slow`: about 3 s, +172.7% beside the best of those that were judged; --points=N judges more" in text


def test_late_and_nothing_fits_the_smallest_is_tried_before_the_fastest(tmp_path):
    world = {f"big{n}": (1 + n / 10, 112 - n, None, None) for n in range(5)} | {"small": (9.0, 10, 9.0, 10)}
    search, asked = run(tmp_path, points=4, world=world)
    assert asked[0] == "big0" and "small" in asked and search.best().name == "small"


def test_what_compiles_and_is_too_large_is_refused(tmp_path):
    search, _ = run(tmp_path, world={"one": (1.0, 90, 1.0, HBM + 1)})
    assert search.index["one"].state == search_index.REFUSED and search.best() is None
    assert "no point fits" in search_report.to_text(search.index, HBM)


def test_points_that_the_model_takes_to_be_far_too_large_are_never_asked_about():
    assert first_state("", {"bytes": 1.16 * HBM}, HBM)[0] == search_index.LARGE
    assert first_state("", {"bytes": 1.14 * HBM}, HBM)[0] == search_index.OPEN
    assert first_state("it does not divide", {}, HBM) == (search_index.ILLEGAL, "it does not divide")


def test_the_best_are_confirmed_and_then_ranked_before_all_others(tmp_path):
    own = {"better": judged(1.4), "fast": judged(1.2)}
    search, asked = run(tmp_path, confirm=2, confirmed=own)
    assert asked[-2:] == ["better *", "fast *"]
    assert [entry.name for entry in ranking(search.index)] == ["fast", "better", "slow"]
    assert "fast *" in search_report.to_text(search.index, HBM)


def test_a_search_that_stopped_goes_on_and_judges_nothing_twice(tmp_path):
    _, first = run(tmp_path, stop=2)
    search, second = run(tmp_path)
    assert first == ["fastest", "fast"] and second == ["better", "slow"]
    assert search.index["fast"].verdict == judged(2.0, 95) and search.index["fastest"].state == search_index.REFUSED


def test_a_point_whose_judge_failed_is_tried_again_with_larger_limits_alone(tmp_path):
    search, _ = run(tmp_path, stop=0)
    search.failed("fast", "out of memory", (10.0, 60.0))
    for limits, state in (((10.0, 60.0), "failed"), ((10.0, 30.0), "failed"), ((20.0, 60.0), "open")):
        again, _ = run(tmp_path, stop=0)
        again.reopen(limits)
        assert again.index["fast"].state == state


def test_another_config_is_refused_in_one_line(tmp_path):
    run(tmp_path)
    for other, says in (
        ({"topology": "v5e:4x4"}, 'topology was "v5e:2x2" and is "v5e:4x4"'),
        ({"config": {"model": {"width": 16}}}, "config.model.width was 8 and is 16"),
    ):
        with pytest.raises(UserError) as error:
            opened(str(tmp_path), SETTINGS | other, entries())
        assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 99, "settings": {}, "points": []}'])
def test_a_damaged_index_is_one_line(tmp_path, content):
    (tmp_path / search_index.NAME).write_text(content)
    with pytest.raises(UserError) as error:
        opened(str(tmp_path), SETTINGS, entries())
    assert search_index.NAME in str(error.value) and "\n" not in str(error.value)


def test_an_index_is_read_as_it_was_written(tmp_path):
    search, _ = run(tmp_path, confirm=1, confirmed={"better": judged(1.0)})
    again = opened(str(tmp_path), SETTINGS, entries())
    assert {entry.name: entry for entry in again if entry.verdict} == {
        entry.name: entry for entry in search.index if entry.verdict
    }


def test_a_plan_is_judged_by_its_estimate():
    estimate = {"step_seconds": 3.0, "bound_by": "attention", "mfu": 0.4}
    plan = {"cycles": 100, "memory": {"total_bytes": 5}, "estimate": estimate}
    assert verdict(json.loads(json.dumps(plan))) == Verdict(3.0, 5, "attention", 0.4, 100)


def search_of(folder, world, *, points=9, confirm=0):
    return Search(opened(str(folder), SETTINGS, entries(world)), Limits(points, confirm, HBM))


def explored(folder, seconds, *, points=9, confirm=0):
    """A search whose points were judged with the compiler's default options, at these times."""
    search = search_of(folder, {name: (1.0, 50, each, 50) for name, each in seconds.items()}, confirm=confirm)
    for name, each in seconds.items():
        search.judged(name, judged(each))
    return search


def test_with_more_points_a_faster_one_is_confirmed_too_and_wins(tmp_path):
    before = explored(tmp_path, {"a": 3.0, "b": 4.0}, confirm=2)
    for seconds in (2.8, 3.8):
        before.confirmed(before.following_to_confirm(), judged(seconds))
    world = {name: (1.0, 50, None, None) for name in ("a", "b", "c")}
    search = search_of(tmp_path, world, points=3, confirm=2)
    assert search.following() == "c"
    search.judged("c", judged(1.0))
    assert search.following_to_confirm() == "c" and search.following_to_confirm() is None
    search.confirmed("c", judged(0.9))
    assert search.following_to_confirm() is None
    assert [entry.name for entry in ranking(search.index)] == ["c", "a", "b"]


def test_the_next_best_is_confirmed_where_the_compiler_refuses_one_of_the_best(tmp_path):
    search = explored(tmp_path, {"a": 1.0, "b": 2.0, "c": 3.0}, confirm=2)
    assert {search.following_to_confirm(), search.following_to_confirm()} == {"a", "b"}
    search.not_confirmed("a", "does not fit")
    assert search.following_to_confirm() == "c" and search.following_to_confirm() is None
    search.confirmed("b", judged(2.0))
    search.confirmed("c", judged(3.0, HBM + 1))
    assert [entry.name for entry in ranking(search.index)] == ["b"]
    assert "2 do not fit, by the compiler" in search_report.to_text(search.index, HBM)


def test_a_confirmation_that_comes_to_no_end_leaves_the_point_as_it_was_explored(tmp_path):
    search = explored(tmp_path, {"a": 1.0, "b": 2.0, "c": 3.0}, confirm=2)
    tried = []
    while (name := search.following_to_confirm()) is not None:
        tried.append(name)
        search.unconfirmed(name, "it took more than 60 min", (10.0, 3600.0))
    assert tried == ["a", "b"]
    assert search.best().name == "a" and search.best().best == judged(1.0)
    text = search_report.to_text(search.index, HBM)
    assert "do not fit" not in text
    assert "a was not judged with the config's own compiler options: it took more than 60 min" in text
    again = search_of(tmp_path, {name: (1.0, 50, None, None) for name in "abc"}, confirm=2)
    again.reopen((10.0, 3600.0))
    assert again.following_to_confirm() is None
    again.reopen((10.0, 7200.0))
    assert again.following_to_confirm() == "a"
    again.confirmed("a", judged(2.5))
    assert [entry.name for entry in ranking(again.index)] == ["a", "b", "c"]


def test_no_limit_is_more_than_any(tmp_path):
    search, _ = run(tmp_path, stop=0)
    search.failed("fast", "it took too long", (10.0, 60.0))
    search.reopen((10.0, 0.0))
    assert search.index["fast"].state == "open"
    search.failed("fast", "out of memory", (10.0, 0.0))
    search.reopen((10.0, 7200.0))
    assert search.index["fast"].state == "failed"


def test_points_of_another_space_count_for_nothing_and_are_kept(tmp_path):
    before = explored(tmp_path, {"a": 1.0, "b": 2.0}, confirm=0)
    before.refused("a", "does not fit")
    other = {"x": (1.0, 50, None, None), "y": (2.0, 50, None, None)}
    search = search_of(tmp_path, other, points=2)
    assert search.following() == "x" and search.following() == "y"
    search.judged("x", judged(5.0))
    assert search.best().name == "x" and len(search.index) == 2
    assert "b" not in search_report.to_markdown(search.index, HBM).split("`")
    wide = search_of(tmp_path, {name: (1.0, 50, None, None) for name in ("a", "b", "x", "y")})
    states = {entry.name: entry.state for entry in wide.index}
    assert states == {"a": "refused", "b": "judged", "x": "judged", "y": "open"}
    assert wide.best().name == "b"


@pytest.mark.parametrize("confirms", [False, True])
def test_a_plan_that_the_compiler_refused_is_not_taken_for_one_that_fits(tmp_path, confirms):
    """As a killed search leaves it: by our reading of the text it would fit, by the compiler's word it does not."""
    search = (
        explored(tmp_path, {"a": 1.0}, confirm=1) if confirms else search_of(tmp_path, {"a": (1.0, 50, None, None)})
    )
    (tmp_path / search_index.POINTS).mkdir()
    plan = {"fits": False, "problem": "the program does not fit", "memory": {"total_bytes": HBM - 1}, "cycles": 1}
    plan["estimate"] = {"step_seconds": 1.0, "bound_by": "products", "mfu": 0.5}
    with open(search.index.plan_path("a", confirmed=confirms), "w") as file:
        json.dump(plan, file)
    round_ = plan_search._Round(search, [], argparse.Namespace(cache=None), (0.0, 0.0), confirms=confirms)
    assert round_.following() is None
    assert search.best() is None
    assert "1 do not fit, by the compiler, such as a: the program does not fit" in search_report.to_text(
        search.index, HBM
    )


def test_plans_without_their_index_are_not_believed(tmp_path):
    search = explored(tmp_path, {"a": 1.0})
    (tmp_path / search_index.POINTS).mkdir()
    (tmp_path / search_index.POINTS / "a.json").write_text("{}")
    (tmp_path / search_index.NAME).unlink()
    with pytest.raises(UserError, match="holds plans of a search whose search.json is gone; delete it") as error:
        search_of(tmp_path, {"a": (1.0, 50, None, None)})
    assert str(tmp_path) in str(error.value) and search.index["a"].verdict


@pytest.mark.parametrize("judge", [True, False])
def test_a_name_that_means_another_point_now_loses_its_plan(tmp_path, judge):
    search = search_of(tmp_path, {"a": (1.0, 50, None, None)})
    if judge:
        search.judged("a", judged(1.0))
    search.index.write()
    (tmp_path / search_index.POINTS).mkdir()
    for confirmed in (False, True):
        with open(search.index.plan_path("a", confirmed=confirmed), "w") as file:
            file.write("{}")
    search_of(tmp_path, {"b": (1.0, 50, None, None)}).index.write()
    other = Entry(Point("a", {"config.name": "A"}), "open", "", {"bytes": 50, "seconds": 1.0, "bound_by": "products"})
    assert opened(str(tmp_path), SETTINGS, [other])["a"] == other
    assert not list((tmp_path / search_index.POINTS).iterdir())


def test_a_search_names_the_commit_of_this_program(monkeypatch):
    """So that verdicts of another one are not believed."""
    for found, version in (({"commit": 40 * "a", "changed": True}, f"{__version__} {12 * 'a'}"), (None, __version__)):
        monkeypatch.setattr(manifest, "revision", lambda found=found: found)
        assert plan_search._version() == version


def test_a_point_whose_activations_no_host_holds_is_never_asked_about():
    known = {"bytes": 10, "on_host": 30}
    state, said = first_state("", known, HBM, 20.0)
    assert state == search_index.LARGE and said == "leaves about 30 B of 20 B of the host by the analytic model"
    assert first_state("", known, HBM, 40.0)[0] == search_index.OPEN


@pytest.mark.parametrize(
    ("world", "points", "says"),
    [
        ({"a": (1.0, 130, None, None), "b": (2.0, 120, None, None)}, 9, "smallest of 2, b, needs about 120 B of 100"),
        ({"a": (1.0, 90, None, None), "b": (2.0, 80, 1.0, 80)}, 1, "b, needs about 80 B of 100 B a device by"),
        ({"a": (1.0, 90, None, None)}, 9, "and the compiler refuses it; give more chips"),
    ],
)  # fmt: skip
def test_where_nothing_fits_it_is_said_what_would_help(tmp_path, world, points, says):
    search, _ = run(tmp_path, points=points, world=world)
    assert search.best() is None
    assert says in search.why_none() and "\n" not in search.why_none()


def test_where_nothing_could_be_judged_the_reason_is_told(tmp_path):
    search = search_of(tmp_path, {"a": (1.0, 50, None, None)}, points=1)
    search.failed(search.following(), "it took more than 60 min to judge", (1.0, 3600.0))
    assert search.why_none() == "1 of 1 could not be judged, such as a: it took more than 60 min to judge"


def test_a_search_goes_on_with_a_dimension_that_an_earlier_one_did_not_have(tmp_path):
    """The points of before, of the config's own blocks, are judged no second time."""
    earlier, _ = run(tmp_path, world={"a": (1.0, 50, 1.0, 50), "b": (2.0, 50, 2.0, 50)})
    assert earlier.best().name == "a"
    wider = {"a": (1.0, 50, None, None), "b": (2.0, 50, None, None), "a-blocks512": (0.9, 50, 0.5, 50)}
    search, asked = run(tmp_path, world=wider)
    assert asked == ["a-blocks512"] and search.best().name == "a-blocks512"
    assert [entry.name for entry in ranking(search.index)] == ["a-blocks512", "a", "b"]
