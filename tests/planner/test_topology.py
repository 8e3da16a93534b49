"""The devices of topologies, and what is said where the TPU compiler is not to be had."""

import importlib.util
import platform

import pytest

from t5x_like.core.errors import UserError
from t5x_like.planner import topology


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*not installed; pip install 't5x_like\[tpu\]'"):
        topology.topology("v5e:2x2")


def test_on_a_machine_that_the_compiler_does_not_know_one_line_says_so(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(UserError, match="Linux x86-64 alone, not linux arm64"):
        topology.topology("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5e:1x1", 1, 1), ("v4:2x2x1", 4, 4), ("v5p:4x4x4", 64, 64), ("v6e:2x4", 8, 8), ("tpu7x:2x2x1", 4, 8)],
)
def test_devices_are_one_a_chip_and_two_on_tpu7x(compiler, name, chips, devices):
    found = topology.topology(name)
    assert (found.chips, len(found.devices)) == (chips, devices)
    assert {device.platform for device in found.devices} == {"tpu"}
