"""A start on other devices than the last one: the same run on another mesh. What changes is said in one line.

Batches are a function of the step and checkpoints know no mesh, so that a run goes on wherever its mesh can be laid:
with `-1` for one axis of config.mesh, on what is there; with fixed numbers, where their product is the devices. In
reinforcement learning batches are drawn: where rounding changes one token of an answer, all that follows is another.
"""

import math
from collections.abc import Mapping
from typing import Any

from t5x_like.parallel.rules import Rules

# What stays the same, of batches that are read and of answers that are drawn.
READ = "batches and updates stay the same, losses up to rounding (sums are taken in another order)"
DRAWN = "prompts stay the same, answers drawn from here on may differ (sums are taken in another order)"


def changed(
    before: Mapping[str, Any], now: Mapping[str, Any], *, rules: Rules, rows: int, stays: str = READ
) -> str | None:
    """The line, or None where nothing changed that moves a bit.

    before, now: {"mesh": {axis: size}, "devices", "processes", "platform"}, as the manifest has them. rows: of a batch.
    stays: READ or DRAWN.

    >>> from t5x_like.parallel.rules import rules
    >>> one = {"mesh": {"fsdp": 8}, "devices": 8, "processes": 2, "platform": "tpu"}
    >>> two = {"mesh": {"fsdp": 4}, "devices": 4, "processes": 1, "platform": "tpu"}
    >>> changed(one, two, rules=rules(""), rows=16).partition(" -> ")[0]
    'another mesh than at the last start: fsdp=8 (8 tpu devices, 2 processes)'
    >>> changed(one, two, rules=rules(""), rows=16, stays=DRAWN).partition("; ")[2].partition(";")[2]
    ' prompts stay the same, answers drawn from here on may differ (sums are taken in another order)'
    """
    same_mesh = _sizes(before) == _sizes(now)
    if same_mesh and all(before.get(name, now[name]) == now[name] for name in ("devices", "processes", "platform")):
        return None
    what = "other processes or devices" if same_mesh else "another mesh"
    a, b = (rows // shards(found.get("mesh", {}), rules) for found in (before, now))
    return (
        f"{what} than at the last start: {_described(before)} -> {_described(now)}; {a} -> {b} of the {rows} rows of a "
        f"batch on a device; {stays}"
    )


def shards(mesh: Mapping[str, int], rules: Rules) -> int:
    """In how many parts a batch is cut."""
    axes = dict(rules.table)["batch"]
    return math.prod(mesh.get(axis, 1) for axis in axes)


def _sizes(found: Mapping[str, Any]) -> dict[str, int]:
    return {axis: size for axis, size in found.get("mesh", {}).items() if size > 1}


def _described(found: Mapping[str, Any]) -> str:
    axes = " x ".join(f"{axis}={size}" for axis, size in sorted(_sizes(found).items())) or "no axis"
    platform, processes = found.get("platform", ""), found.get("processes", 1)
    several = f", {processes} processes" if processes > 1 else ""
    return f"{axes} ({found.get('devices', '?')} {platform} devices{several})"
