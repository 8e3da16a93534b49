"""Rates are exact: at every prefix each component is within one example of its share."""

import dataclasses
import fractions

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data.config import MixtureConfig
from t5x_like.data.read import mixtures

CONFIG = MixtureConfig({"a": "", "b": ""}, {}, None, 1.0, 1.0, "examples")


def size(examples, *, tokens=None, rows=None):
    """A component whose rows hold 10 tokens, and its documents 10 tokens each unless `tokens` says otherwise."""
    tokens = tokens or 10 * examples
    return mixtures.Size(examples, tokens, rows or -(-tokens // 10), fractions.Fraction(10))


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_every_prefix_is_within_one_of_the_rates(shares):
    total = sum(shares)
    components, indices = mixtures.Slots(shares).locate(np.arange(2 * total + total // 2))
    for component, share in enumerate(shares):
        mine = components == component
        assert np.array_equal(indices[mine], np.arange(mine.sum()))  # no index is left out or repeated
        ideal = np.arange(1, len(mine) + 1) * share / total
        assert np.abs(np.cumsum(mine) - ideal).max() < 1


def test_the_place_of_an_example_does_not_depend_on_who_asks():
    slots = mixtures.Slots([3, 5, 2])
    order = np.random.default_rng(0).permutation(100)
    together = slots.locate(np.arange(100))
    one_by_one = [slots.locate(order[i : i + 1]) for i in range(100)]
    for part in range(2):
        assert np.array_equal(together[part][order], [result[part][0] for result in one_by_one])


def test_rates_are_kept_as_they_are_written():
    assert mixtures.shares([fractions.Fraction(text) for text in ("1", "1.009", "1")]) == [1000, 1009, 1000]


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=8))
def test_rates_too_fine_for_a_period_are_rounded_to_a_part_in_a_quarter_million(rates):
    whole = mixtures.shares([fractions.Fraction(repr(rate)) for rate in rates])
    assert min(whole) >= 1 and sum(whole) <= (1 << 18) + len(rates)
    for share, rate in zip(whole, rates, strict=True):
        assert abs(share / sum(whole) - rate / sum(rates)) < 2e-5


def test_rates_from_sizes_are_those_of_seqio():
    config = dataclasses.replace(CONFIG, maximum=500.0, scale=2.0, temperature=2.0)
    rates = mixtures.row_rates(config, {"a": size(100), "b": size(10_000)}, {"a": None, "b": None})
    assert float(rates["a"] / rates["b"]) == pytest.approx((200 / 500) ** 0.5)


def test_a_rate_of_examples_becomes_one_of_rows_by_the_length_of_documents():
    long = size(100, tokens=4000)  # four times as long: four times as many rows for the same number of documents
    rates = mixtures.row_rates(
        dataclasses.replace(CONFIG, rates={"a": 1.0, "b": 1.0}), {"a": size(100), "b": long}, {"a": None, "b": None}
    )
    assert rates["b"] == 4 * rates["a"]
    by_tokens = dataclasses.replace(CONFIG, rates={"a": 1.0, "b": 1.0}, counts="tokens")
    rates = mixtures.row_rates(by_tokens, {"a": size(100), "b": long}, {"a": None, "b": None})
    assert rates["b"] == rates["a"]


def test_proportional_rates_read_every_document_equally_often():
    sizes = {"a": size(100, tokens=1000), "b": size(50, tokens=7000)}
    rates = mixtures.row_rates(CONFIG, sizes, {"a": None, "b": None})
    assert rates["a"] / sizes["a"].rows == rates["b"] / sizes["b"].rows


def test_a_component_of_rate_zero_is_not_read():
    config = dataclasses.replace(CONFIG, rates={"a": 1.0, "b": 0.0})
    assert list(mixtures.row_rates(config, {"a": size(1), "b": size(1)}, {"a": None, "b": None})) == ["a"]


STATED: dict[str, float | None] = {"a": 1.0, "b": 3.0}  # by a SeqIO mixture, whose tasks are the components


def of_seqio(**change):
    return mixtures.row_rates(dataclasses.replace(CONFIG, sources={}, **change), {"a": size(9), "b": size(9)}, STATED)


def test_rates_of_the_config_go_before_those_of_a_seqio_mixture():
    assert of_seqio()["b"] == 3 * of_seqio()["a"]
    own = of_seqio(rates={"a": 5.0, "b": 1.0})
    assert own["a"] == 5 * own["b"]
    with pytest.raises(UsageError, match="rates lacks b"):
        of_seqio(rates={"a": 5.0})


@pytest.mark.parametrize("change", [{"maximum": 5.0}, {"scale": 2.0}, {"temperature": 2.0}, {"counts": "tokens"}])
def test_what_would_not_change_the_rates_is_refused(change):
    [(name, value)] = change.items()
    message = f"config.data.mixture.{name}={value} would have no effect"
    with pytest.raises(UsageError, match=f"{message}: the SeqIO mixture has its own rates"):
        of_seqio(**change)
    rates = {"a": 5.0, "b": 1.0}
    if name == "counts":  # what the config's own rates count
        assert of_seqio(rates=rates, **change)
    else:
        with pytest.raises(UsageError, match=f"{message}: config.data.mixture.rates decides"):
            of_seqio(rates=rates, **change)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"a": 1.0, "c": 1.0}, "rates.c: no such source"),
        ({"a": 1.0}, "rates lacks b"),
        ({"a": 1.0, "b": -1.0}, "rates.b=-1.0"),
        ({"a": float("nan"), "b": 1.0}, "rates.a=nan"),
        ({"a": 0.0, "b": 0.0}, "all rates are 0"),
    ],
)
def test_wrong_rates_are_named(rates, expected):
    with pytest.raises(UsageError, match=expected):
        mixtures.row_rates(
            dataclasses.replace(CONFIG, rates=rates), {"a": size(1), "b": size(1)}, {"a": None, "b": None}
        )


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"temperature": -1.0}, {"counts": "rows"}])
def test_a_wrong_rule_of_rates_is_named(change):
    [(name, value)] = change.items()
    with pytest.raises(UsageError, match=f"config.data.mixture.{name}={value!r}"):
        mixtures.row_rates(dataclasses.replace(CONFIG, **change), {"a": size(1)}, {"a": None})
