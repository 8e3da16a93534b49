"""The keyed permutation is a bijection for every size and key, and shuffles."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from t5x_like.data.read.permutation import permute


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(size=st.integers(1, 5000), key=st.text(max_size=8))
def test_every_element_appears_once(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(size=st.integers(1, 2**62), positions=st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_a_position_gives_the_same_element_whoever_else_asks(size, positions):
    wanted = np.array(positions) % size
    together = permute(wanted, size, "key")
    assert np.array_equal(together, [permute(np.array([position]), size, "key")[0] for position in wanted])
    assert together.min() >= 0 and together.max() < size


def test_keys_give_unrelated_orders():
    size = 4096
    first, second = (permute(np.arange(size), size, key) for key in ("0/train/0", "0/train/1"))
    assert (first == second).sum() < 10  # 1 is expected of two random orders
    assert (first == np.arange(size)).sum() < 10


@pytest.mark.parametrize("size", [3, 5, 100, 101, 1000])
def test_every_element_is_about_equally_often_first(size):
    draws = 60 * size
    first = [int(permute(np.array([0]), size, f"{number}")[0]) for number in range(min(draws, 6000))]
    counts = np.bincount(first, minlength=size)
    expected = len(first) / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < size + 5 * np.sqrt(2 * size) + 5  # the mean is size - 1, the deviation sqrt(2 size)


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(10_000), 10_000, "key")
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
