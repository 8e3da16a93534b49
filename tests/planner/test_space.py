"""The space of a search: meshes, points, names, and what is refused."""

import dataclasses
import math

import pytest

from t5x_like.core.errors import UsageError
from t5x_like.layers.remat import POLICIES
from t5x_like.parallel.mesh import MeshConfig, axis_sizes
from t5x_like.parallel.rules import MESH_AXES
from t5x_like.planner.search import space
from t5x_like.planner.search.space import Base

FSDP = MeshConfig("fsdp", "", None, None, None, None, None, None, None)
BASE = Base(FSDP, axis_sizes(FSDP, 8), "none", 1, True)


def points(*flags, base=BASE, devices=8, slices=1):
    return list(space.points(space.read(flags, base), base, devices, slices=slices))


def of(*flags, **named):
    return {point.name: dict(point.overrides) for point in points(*flags, **named)}


ONE = ("--search.remat=none", "--search.micro_batches=1", "--search.rules=")


def test_meshes_are_all_ways_to_divide_the_devices():
    """8 = 2^3 over 4 axes: C(6, 3) ways."""
    found = space.shapes(8, space.AXES)
    assert len(found) == math.comb(6, 3) == len({tuple(each.values()) for each in found})
    assert all(math.prod(each.values()) == 8 for each in found)
    assert all(each["slice"] == 2 and math.prod(each.values()) == 8 for each in space.shapes(8, ("data",), slices=2))


def test_the_config_as_it_is_is_a_point_without_overrides():
    assert of(*ONE)["fsdp8-none"] == {}


def test_a_mesh_says_only_what_is_other_than_in_the_config_and_leaves_one_axis_open():
    found = of(*ONE)
    assert found["fsdp4-tensor2-none"] == {"config.mesh.tensor": 2}
    assert found["data2-fsdp4-none"] == {"config.mesh.data": 2}
    assert found["data8-none"] == {"config.mesh.data": -1, "config.mesh.fsdp": 1}
    assert found["sequence4-tensor2-none"] == {
        "config.mesh.fsdp": 1, "config.mesh.sequence": 4, "config.mesh.tensor": 2
    }  # fmt: skip


def test_every_point_is_a_mesh_of_these_devices():
    for point in points(*ONE):
        sizes = {path.removeprefix("config.mesh."): size for path, size in point.overrides.items()}
        config = MeshConfig("fsdp", "", *(sizes.get(axis) for axis in MESH_AXES))
        named = dict(part for part in _named(point.name))
        assert {axis: size for axis, size in axis_sizes(config, 8).items() if size > 1} == named


def _named(name):
    for word in name.split("-"):
        axis = word.rstrip("0123456789")
        if axis in space.AXES:
            yield axis, int(word[len(axis) :])


def test_parameters_are_spread_where_more_than_one_axis_can_hold_them():
    found = of("--search.remat=none", "--search.micro_batches=1")
    spread = {name: each["config.mesh.rules"] for name, each in found.items() if "spread" in name}
    assert spread["data2-fsdp4-spread-none"] == "embed=data+fsdp"
    assert spread["sequence8-spread-none"] == "embed=sequence"
    assert not any("fsdp" not in text and "data" in text for text in spread.values()), "fsdp does that by itself"


def test_dimensions_multiply_and_fields_join():
    found = of(
        "--search.mesh=fsdp", "--search.remat=full;dots", "--search.micro_batches=1,2", "--search.scan=True,False",
        "--search.config.optim.name=adamw,adafactor", "--search.rules=",
    )  # fmt: skip
    assert len(found) == 16
    assert found["fsdp8-dots-mb2-unrolled-name-adafactor"] == {
        "config.model.remat": "dots",
        "config.loop.micro_batches": 2,
        "config.model.scan": False,
        "config.optim.name": "adafactor",
    }


def test_all_policies_are_searched_unless_somebody_says_otherwise():
    found = {each.get("config.model.remat", "none") for each in of("--search.micro_batches=1").values()}
    assert found == set(space.REMAT) and set(POLICIES) < found


def test_what_the_command_line_sets_is_not_searched():
    base = Base(FSDP, axis_sizes(FSDP, 8), "dots", 2, True, frozenset({
        "config.model.remat", "config.mesh.tensor", "config.loop.micro_batches"}))  # fmt: skip
    assert of(base=base) == {"fsdp8-dots-mb2": {}}


def test_flags_hold_no_blanks_and_are_unique():
    for point in points("--search.rules=; mlp = tensor + sequence, embed="):
        assert not any(letter.isspace() for flag in point.flags for letter in flag)
    assert len({tuple(point.flags) for point in points()}) == len(points()) == len(of())


def test_values_with_commas_are_separated_by_semicolons():
    found = of(*ONE, "--search.mesh=fsdp", "--search.config.model.decoder.windows=(1,2);(3,4)")
    assert [each["config.model.decoder.windows"] for each in found.values()] == ["(1,2)", "(3,4)"]


@pytest.mark.parametrize(("field", "values"), [("x", "-1,1"), ("name", "a_b,a-b"), ("name", "A,a"), ("x", "1.5,1-5")])
def test_values_that_differ_by_signs_alone_are_points_of_their_own(field, values):
    found = of(*ONE, "--search.mesh=fsdp", f"--search.config.data.{field}={values}")
    assert [each[f"config.data.{field}"] for each in found.values()] == values.split(",")
    assert found == of(*ONE, "--search.mesh=fsdp", f"--search.config.data.{field}={values}")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--search.mesh=fsdq", "'fsdq' is no axis of a mesh that can be chosen; did you mean 'fsdp'"),
        ("--search.mesh=slice", "'slice' is no axis"),
        ("--search.remat=some", "'some' is unknown"),
        ("--search.remat=", "the space is empty"),
        ("--search.remat", "give each dimension once"),
        ("--search.micro_batches=0", "should be a number from 1"),
        ("--search.blocks=100", "'100' should be a multiple of 128"),
        ("--search.blocks=0", "'0' should be a multiple of 128"),
        ("--search.config.model.attention_block=512,1024", "use --search.blocks=..."),
        ("--search.scan=perhaps", "should be True or False"),
        ("--search.config.loop.micro_batches=2,4", "is a dimension of its own; use --search.micro_batches=..."),
        ("--search.config.model.scan=True,False", "use --search.scan=..."),
        ("--search.config.mesh.tensor=2", "use --search.mesh=..."),
        ("--search.config.data.source=a b", "a value with blanks would be cut"),
        ("--search.meshes=fsdp", "no dimension 'meshes' of a search; did you mean 'mesh'"),
    ],
)
def test_what_cannot_be_searched_is_one_line(flag, says):
    with pytest.raises(UsageError) as error:
        points(flag)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_field_is_searched_or_set():
    base = Base(FSDP, axis_sizes(FSDP, 8), "dots", 1, True, frozenset({"config.model.remat"}))
    with pytest.raises(UsageError, match="searches what --config.model.remat sets"):
        points("--search.remat=full", base=base)


def test_blocks_of_attention_are_searched_where_they_divide_a_row():
    base = dataclasses.replace(BASE, lengths=(4096,))
    found = of(*ONE, "--search.mesh=fsdp", base=base)
    assert found == {
        "fsdp8-none": {},
        "fsdp8-none-blocks512": {"config.model.attention_block": 512},
        "fsdp8-none-blocks2048": {"config.model.attention_block": 2048},
    }
    assert list(of(*ONE, "--search.mesh=fsdp", base=dataclasses.replace(BASE, lengths=(1536,)))) == [
        "fsdp8-none-blocks512", "fsdp8-none"
    ]  # fmt: skip
    assert list(of(*ONE, "--search.mesh=fsdp")) == ["fsdp8-none"]  # no kernel serves these rows
    said = dataclasses.replace(base, said=frozenset({"config.model.attention_block"}))
    assert list(of(*ONE, "--search.mesh=fsdp", base=said)) == ["fsdp8-none"]
    assert list(of(*ONE, "--search.mesh=fsdp", "--search.blocks=256,1024")) == ["fsdp8-none-blocks256", "fsdp8-none"]


def test_a_policy_with_the_host_is_searched():
    assert any("@host" in policy for policy in space.REMAT)
