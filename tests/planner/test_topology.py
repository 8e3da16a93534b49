"""Names of topologies: what is accepted, what is refused and how, and what devices come of it."""

import importlib.util
import platform

import pytest

from t5x_like.core.errors import UsageError, UserError
from t5x_like.planner import topology


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5", "'v5' is unknown; did you mean 'v5p'?"),
        ("h100:8", "known: tpu7x, v4, v5e, v5p, v6e"),
        ("v5p", "give the chips along each dimension, such as v5p:4x4x4"),
        ("v5e:", "such as v5e:4x4"),
        ("v5p:4x4x", "such as v5p:4x4x4"),
        ("v5p:0x4x4", "such as v5p:4x4x4"),
        ("v5p:3x3x3", "is no slice of v5p; there are 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, and AxBxC in multiples of 4"),
        ("v5p:4x4", "is no slice of v5p"),
        ("v5p:64x64x64", "up to 8960 chips"),
        ("v5e:2x2x2", "is no slice of v5e; there are 1x1, 2x2, 2x4"),
        ("v6e:3x3", "is no slice of v6e"),
    ],
)
def test_a_bad_topology_is_one_line_that_names_what_there_is(name, says):
    with pytest.raises(UsageError) as error:
        topology.parse(name)
    assert f"--topology={name}" in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_rings_close_over_whole_cubes_and_over_sixteen_chips():
    assert topology.wraps((4, 4, 8)) == (True, True, True)
    assert topology.wraps((2, 4, 4)) == (False, False, False)
    assert topology.wraps((8, 16)) == (False, True, False)
    assert topology.wraps((2, 4)) == (False, False, False)


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
