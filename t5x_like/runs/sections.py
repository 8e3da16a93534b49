"""The sections of a run, read off their classes: what a resume may change, and what an override may not."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from t5x_like.core import config as bridge
from t5x_like.core.errors import UsageError


def may_change(cls: type) -> tuple[str, ...]:
    """The sections and fields, as dotted paths, that leave a run the same, or change it as asked."""
    return tuple(bridge.marked(cls, "resume"))


def refuse_unnamed_variants(cls: type, sections: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """An override below a variant that is not named is refused: it would change nothing."""
    for path in overrides:
        owner, node, where = cls, sections, "config"
        for part in path.split("."):
            if owner is None or part not in (fields := {field.name: field for field in dataclasses.fields(owner)}):
                break
            if "variant" in fields[part].metadata and node["name"] != part:
                raise UsageError(f"config.{path} has no effect, since {where}.name={node['name']!r}")
            owner, node, where = bridge.section_class(owner, part), node[part], f"{where}.{part}"


def value(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path of a config as it was stored, or None."""
    node: Any = config
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
