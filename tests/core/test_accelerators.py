"""Names of slices: what is accepted, what is refused and how, and what follows from a shape."""

import pytest

from t5x_like.core import accelerators
from t5x_like.core.errors import UsageError


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
        accelerators.parse(name)
    assert f"--topology={name}" in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_rings_close_over_whole_cubes_and_over_sixteen_chips():
    assert accelerators.wraps((4, 4, 8)) == (True, True, True)
    assert accelerators.wraps((2, 4, 4)) == (False, False, False)
    assert accelerators.wraps((8, 16)) == (False, True, False)
    assert accelerators.wraps((2, 4)) == (False, False, False)


def test_what_follows_from_a_shape():
    slice_ = accelerators.parse("v5p:4x4x4")
    assert (slice_.name, slice_.shape, slice_.chips, slice_.vms, slice_.vm_chips) == ("v5p-128", "4x4x4", 64, 16, 4)
    assert (slice_.machine, slice_.row.gke, slice_.devices) == ("ct5p-hightpu-4t", "tpu-v5p-slice", 64)
    assert accelerators.parse("tpu7x:2x2x2").devices == 16
    assert accelerators.parse("v5e:4x4").name == "v5litepod-16"
    assert (accelerators.parse("v6e:1x1").vms, accelerators.parse("v6e:1x1").machine) == (1, "ct6e-standard-1t")


@pytest.mark.parametrize("name", ["v4:1x1x1", "v5p:1x1x1"])
def test_a_chip_that_no_machine_has_alone_can_be_planned_but_not_rented(name):
    assert accelerators.parse(name).chips == 1
    with pytest.raises(UsageError, match="the smallest slice to be had is .*:2x2x1"):
        print(accelerators.parse(name).vms)


def test_only_v4_takes_its_cubes_in_any_order():
    assert accelerators.parse("v4:8x4x4").chips == 128
    with pytest.raises(UsageError, match="v5p:8x4x4 is no slice of v5p; write v5p:4x4x8"):
        accelerators.parse("v5p:8x4x4")


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("V5P:4x4x4", "v5p:4x4x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-16", "v5e:4x4"),
        ("v5lite-8", "v5e:2x4"),
        ("v5litepod:4x8", "v5e:4x8"),
        ("v6e-64", "v6e:8x8"),
        ("trillium-64", "v6e:8x8"),
        ("tpu7x-128", "tpu7x:4x4x4"),
        ("ironwood:2x2x1", "tpu7x:2x2x1"),
        ("tpu7x-standard-4t:2x2x2", "tpu7x:2x2x2"),
        ("tpu-v5p-slice:4x4x4", "v5p:4x4x4"),
        ("tpu-v4-podslice:2x2x4", "v4:2x2x4"),
        ("tpu-v5-lite-podslice:2x4", "v5e:2x4"),
        ("tpu-v6e-slice:4x4", "v6e:4x4"),
        ("ct5p-hightpu-4t:2x2x2", "v5p:2x2x2"),
        ("ct6e-standard-1t:1x1", "v6e:1x1"),
        ("v5p-512:4x8x8", "v5p:4x8x8"),
    ],
)
def test_a_slice_is_understood_in_every_spelling_that_people_have(name, spelled):
    assert accelerators.parse(name).spelled == spelled


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-512", "has several shapes; write v5p:4x4x16 or v5p:4x8x8"),
        ("v5p-100", "no slice of v5p has 100 TensorCores (2 a chip); the nearest are v5p-64 and v5p-128"),
        ("v5e-1000", "no slice of v5e has 1000 TensorCores (1 a chip); the nearest are v5litepod-256"),
        ("v5p-512:4x4x4", "v5p:4x4x4 is v5p-128; write one of them alone"),
        ("tpu-v5p-slice", "give the chips along each dimension, such as tpu-v5p-slice:4x4x4"),
        ("tpu-v6e-slice:3x3", "is no slice of v6e"),
        ("h100-8", "'h100-8' is unknown"),
    ],
)
def test_a_name_of_no_slice_or_of_several_is_one_line_with_what_to_write(name, says):
    with pytest.raises(UsageError) as error:
        accelerators.parse(name)
    assert f"--topology={name}" in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)


def test_slices_of_an_accelerator_type():
    assert [each.shape for each in accelerators.slices_named("v5p-512")] == ["4x4x16", "4x8x8"]
    assert accelerators.slices_named("v5p-7") == []


def test_every_slice_is_parsed_as_it_is_spelled_and_fits_its_machines():
    for generation, row in accelerators.GENERATIONS.items():
        found = accelerators.slices(generation)
        assert len({each.spelled for each in found}) == len(found) > 5
        assert max(each.chips for each in found) <= row.largest
        for each in found:
            assert accelerators.parse(each.spelled) == each
            if each.chips > 1:
                assert each.vms * each.vm_chips == each.chips
