"""Claims about nested dicts and rules over their paths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_like.core import tree
from t5x_like.core.errors import UsageError

NAMES = st.sampled_from(["a", "b", "c", "layers"])
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=8).filter(
    lambda value: isinstance(value, dict)
)


@given(TREES)
def test_flatten_and_unflatten_are_inverse(value):
    assert tree.unflatten(tree.flatten(value)) == value


@given(TREES, st.sets(NAMES))
def test_join_undoes_split(value, chosen):
    inside, outside = tree.split(value, lambda path: path.split("/")[-1] in chosen)
    assert tree.join(inside, outside) == value


def test_joining_trees_that_share_a_leaf_is_refused():
    with pytest.raises(ValueError, match="a/b"):
        tree.join({"a": {"b": 1}}, {"a": {"b": 2}})


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = [("layers/.*/bias", 0.0), ("layers/.*", 1.0), (".*", 2.0)]
    paths = ["layers/mlp/bias", "layers/mlp/up", "embed", "xlayers/mlp"]
    assert list(tree.match_rules(rules, paths, where="x").values()) == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "rules,message",
    [
        ([("a", 1)], "no rule matches 'b'"),
        ([("typo.*", 1), (".*", 0)], "'typo.*' matches no parameter"),
        ([("(", 1)], "no regular expression"),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, message):
    with pytest.raises(UsageError, match=f"config.optim.decay.*{message}"):
        tree.match_rules(rules, ["a", "b"], where="config.optim.decay")


def test_a_rule_that_earlier_rules_shadow_is_not_called_unmatched():
    assert tree.match_rules([(".*", 1), ("a", 2)], ["a"], where="x") == {"a": 1}
