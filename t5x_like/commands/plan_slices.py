"""How many slices a plan or a check is of: `--slices`, or what the config says where that is silent."""

from collections.abc import Mapping
from typing import Any

from t5x_like.runs.arguments import section


def of(given: int | None, config: Mapping[str, Any]) -> int:
    """given: `--slices`, None where it was not given; else config.mesh.slice, where it is a number; else 1."""
    return max(section(config, "mesh").get("slice") or 1, 1) if given is None else given
