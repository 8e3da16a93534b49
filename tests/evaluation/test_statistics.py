"""Claims about standard errors and paired differences, against plain formulas."""

import math
import tracemalloc

import numpy as np
import pytest

from t5x_like.evaluation import report, statistics
from t5x_like.evaluation.results import Evaluation, Metric
from t5x_like.evaluation.statistics import Difference, mean
from t5x_like.evaluation.text import bits


def metric(items, *, name="acc", aggregate=mean, better=True, documents=None):
    documents = documents or tuple(map(str, range(len(items))))
    error = statistics.error(items, aggregate)
    return Metric("t", name, "none", aggregate(items), error, better, tuple(items), tuple(documents), aggregate)


def pair(count=400):
    """Two models of which the second is a little better, on documents that are hard for both."""
    random = np.random.default_rng(0)
    hard = random.uniform(0, 1, count)
    before = (hard < 0.5).astype(float)
    return before.tolist(), np.where(random.uniform(0, 1, count) < 0.06, 1.0, before).tolist()


def test_the_error_of_a_mean_is_the_deviation_over_the_root():
    before, _ = pair()
    assert metric(before).error == pytest.approx(np.std(before, ddof=1) / math.sqrt(len(before)))
    assert metric([1.0]).error is None


def test_a_pair_has_a_smaller_error_than_two_models_apart():
    before, after = map(metric, pair())
    (found,) = statistics.differences([before], [after])
    assert found.value == pytest.approx(after.value - before.value) and found.documents == 400
    deltas = np.subtract(after.items, before.items)
    assert found.error == pytest.approx(deltas.std(ddof=1) / 20)
    assert before.error is not None and after.error is not None
    assert found.error < 0.5 * math.hypot(before.error, after.error)
    assert found.value > 2 * found.error and not found.is_worse(2)


def test_a_bootstrap_agrees_with_the_linear_formula():
    random = np.random.default_rng(1)
    weights = random.integers(50, 500, 300)
    losses = weights * random.normal(2.0, 0.4, 300)
    better = losses * random.normal(0.97, 0.02, 300)
    before, after = ([*zip(each.tolist(), weights.tolist(), strict=True)] for each in (losses, better))

    def linear(values):
        rest = values - values.sum() / weights.sum() * weights
        return math.sqrt(300 / 299 * np.square(rest).sum()) / weights.sum() / math.log(2)

    first, second = (metric(each, aggregate=bits, better=False) for each in (before, after))
    assert first.value == pytest.approx(losses.sum() / weights.sum() / math.log(2))
    assert first.error == pytest.approx(linear(losses), rel=0.1)
    (found,) = statistics.differences([first], [second])
    assert found.error == pytest.approx(linear(better - losses), rel=0.1) and found.value < 0
    assert statistics.differences([first], [second]) == [found]  # seeded


def test_only_shared_documents_are_paired():
    before = metric([0.0, 1.0, 1.0], documents=("a", "b", "c"))
    after = metric([1.0, 0.0], documents=("c", "a"))
    (found,) = statistics.differences([before], [after])
    assert (found.documents, found.value) == (2, 0.0)
    assert statistics.differences([before], [metric([1.0], documents=("z",))]) == []


@pytest.mark.parametrize(
    ("value", "error", "better", "worse"),
    [
        (-0.05, 0.02, True, True),
        (-0.03, 0.02, True, False),
        (0.05, 0.02, True, False),
        (0.05, 0.02, False, True),
        (-0.05, None, True, True),
        (0.0, 0.0, True, False),
        (-0.5, 0.01, None, False),
        (math.nan, None, True, True),
        (math.nan, 0.1, False, True),
        (math.nan, None, None, False),
        (math.inf, None, False, True),
    ],
)
def test_worse_is_by_more_than_so_many_errors_in_the_direction_of_the_metric(value, error, better, worse):
    assert Difference("t", "m", "none", value, error, 9, better).is_worse(2.0) == worse


def test_a_value_that_is_no_number_is_worse_than_any_and_a_reference_without_one_is_not():
    sound, diverged = metric([1.0, 0.5], better=False), metric([math.nan, 0.5], better=False)
    endless = metric([math.inf, 0.5], better=False)
    for before, after, worse in [
        (sound, diverged, True),
        (diverged, diverged, True),
        (diverged, sound, False),
        (sound, endless, True),
        (endless, endless, False),
        (endless, sound, False),
    ]:
        (found,) = statistics.differences([before], [after])
        assert found.is_worse(2.0) == worse, (before.value, after.value)
        assert found.error is None


def test_a_report_holds_values_that_are_no_finite_numbers(tmp_path):
    loss = metric([(math.nan, 5.0), (math.inf, 5.5)], name="bits_per_byte", aggregate=bits, better=False)
    acc = metric([-math.inf, 1.0])
    whole = report.Report({}, [Evaluation("a", (loss, acc), {}, 0, {})], {"a": statistics.differences([acc], [acc])})
    report.write(whole, str(tmp_path), samples=False)
    assert '"NaN"' in (tmp_path / "report.json").read_text()
    again = report.read(str(tmp_path / "report.json"))
    assert repr([m.items for m in again.metrics]) == repr([loss.items, acc.items])
    assert repr([m.value for m in again.metrics]) == repr([loss.value, acc.value]) == "[nan, -inf]"
    assert whole.without_number() == [
        "a: t bits_per_byte is nan, no finite number",
        "a: t acc is -inf, no finite number",
    ]


def test_a_bootstrap_gives_what_lists_of_resamples_gave_in_bounded_memory():
    random = np.random.default_rng(2)
    items = [*zip(random.uniform(1, 9, 40).tolist(), random.integers(1, 9, 40).tolist(), strict=True)]
    generator = np.random.default_rng(1234)
    drawn = [generator.integers(0, 40, 40).tolist() for _ in range(1000)]
    values = [bits([items[i] for i in chosen]) for chosen in drawn]
    assert statistics.error(items, bits) == float(np.std(values, ddof=1))
    assert statistics.error(items, lambda items: bits(items)) == float(np.std(values, ddof=1))
    many = [(1.5, 2.0)] * 20_000
    tracemalloc.start()
    assert statistics.error(many, bits) == 0
    assert tracemalloc.get_traced_memory()[1] < 20e6  # lists of all resamples were 160e6 and more
    tracemalloc.stop()


def test_a_report_is_read_again_and_paired(tmp_path):
    before, after = map(metric, pair())
    loss = metric([(3.0, 5.0), (4.0, 5.5)], name="bits_per_byte", aggregate=bits, better=False)
    stored = report.Report({"seed": 1}, [Evaluation("a", (before, loss), {"t": 0}, 3, {})], {})
    report.write(stored, str(tmp_path / "out"), samples=False)
    again = report.read(str(tmp_path / "out" / "report.json"))
    assert again.model == str(tmp_path / "out" / "report.json")
    assert statistics.differences(again.metrics, [after]) == statistics.differences([before], [after])
    assert statistics.differences(again.metrics, [loss])[0].value == 0
    whole = report.Report({}, [again, Evaluation("b", (after, loss), {}, 0, {})], {"b": [*again_pairs(again, after)]})
    page = whole.to_markdown()
    assert f"| t | acc (higher is better) | 400 | {before.value:.4f} +- " in page and "+0.0" in page


def test_no_two_models_share_a_folder_of_samples(tmp_path):
    models = ("a/b", "a_b", "a%5Fb", "/a/b_")
    found = [Evaluation(name, (), {}, 0, {"t": [{"of": name}]}) for name in models]
    report.write(report.Report({}, found, {}), str(tmp_path), samples=True)
    assert len(list((tmp_path / "samples").iterdir())) == len(models)


def again_pairs(again, after):
    return statistics.differences(again.metrics, [after])
