"""Nested dicts with string keys, and rules "regex over path -> value" over them. Not a general pytree library.

A path joins the keys with `/`. Only dicts are walked: whatever else stands in a tree is one leaf.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from t5x_like.core.errors import UsageError
from t5x_like.core.types import Tree

Value = TypeVar("Value")


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) in sorted order of keys, which is also the order of `jax.tree`."""
    for key in sorted(tree):
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(tree[key], Mapping):
            yield from leaves(tree[key], path)
        else:
            yield path, tree[key]


def flatten(tree: Tree) -> dict[str, Any]:
    """
    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    return dict(leaves(tree))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """
    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> dict[str, Any]:
    """The tree of `function(path, leaf, *leaves_of_rest)`; `rest` must have the same paths."""
    others = [flatten(other) for other in rest]
    return unflatten({path: function(path, leaf, *(other[path] for other in others)) for path, leaf in leaves(tree)})


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The subtree whose paths are chosen, and the rest; `join` undoes it.

    >>> split({"a": 1, "b": {"c": 2}}, lambda path: path == "a")
    ({'a': 1}, {'b': {'c': 2}})
    """
    flat = flatten(tree)
    inside = {path: leaf for path, leaf in flat.items() if chosen(path)}
    outside = {path: leaf for path, leaf in flat.items() if not chosen(path)}
    return unflatten(inside), unflatten(outside)


def join(first: Tree, second: Tree) -> dict[str, Any]:
    """One tree of two that share no leaf.

    >>> join({"a": 1}, {"b": {"c": 2}})
    {'a': 1, 'b': {'c': 2}}
    """
    one, two = flatten(first), flatten(second)
    both = one.keys() & two.keys()
    if both:
        raise ValueError(f"both trees hold {sorted(both)[0]!r}")
    return unflatten(one | two)


def match_rules(
    rules: Sequence[tuple[str, Value]], paths: Iterable[str], *, where: str, all_used: bool = True
) -> dict[str, Value]:
    """The value of the first rule whose regex matches the whole path, for every path.

    Raises UsageError (`where` names the config field) for a path without a rule, for a rule that matches no path,
    and for a rule that is no regex.

    >>> match_rules([("a/.*", 1), (".*", 0)], ["a/b", "c"], where="config.optim.decay")
    {'a/b': 1, 'c': 0}
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UsageError(f"{where}: {error.pattern!r} is no regular expression ({error.msg})") from None
    paths = list(paths)
    result: dict[str, Value] = {}
    used: set[int] = set()
    for path in paths:
        for index, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(path):
                used.add(index)
                result[path] = value
                break
        else:
            raise UsageError(f"{where}: no rule matches {path!r}; end the list with a rule for '.*'")
    for index, (pattern, _) in enumerate(compiled):
        matches_something = index in used or any(pattern.fullmatch(path) for path in paths)
        if all_used and not matches_something:
            raise UsageError(f"{where}: {pattern.pattern!r} matches no parameter; the first paths are {paths[:3]}")
    return result
