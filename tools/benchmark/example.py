"""Command-line arguments of the example of `make train`, changed, for measurements that run commands."""

from collections.abc import Mapping


def arguments(overrides: Mapping[str, object]) -> list[str]:
    return ["--config=configs/pretrain/tiny.py", *(f"--config.{field}={value}" for field, value in overrides.items())]
