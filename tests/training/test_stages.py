"""The compiled train step in pipeline stages against one device: same loss, same gradients, whatever is trained and
however the stages lie among other axes of the mesh. The case of every change are CASES; `make nightly` compares all."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest

from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.mesh import MeshConfig
from t5x_like.parallel.rules import MESH_AXES
from tests.training.test_parity import Result, _assert_equal, _config, _stepped

# mesh, micro-batches of the pipeline, repeats
MESHES = {
    "stage=2 data=2 tensor=2": ({"stage": 2, "data": 2, "tensor": 2}, 2, 1),
    "stage=4 over two slices, repeated": ({"fsdp": 2, "stage": 4}, 4, 2),
    "stage=2 fsdp=2 tensor=2, repeated": ({"stage": 2, "fsdp": 2, "tensor": 2}, 4, 2),
    "slice=2 stage=2 fsdp=2": ({"slice": 2, "stage": 2, "fsdp": 2}, 2, 1),
    "stage=2 sequence=2 tensor=2": ({"stage": 2, "sequence": 2, "tensor": 2}, 8, 1),
}
TWO, FOUR, MIXED, SLICES, SEQUENCE = MESHES
# With dropout, and windows of a period of two, which all stretches have.
CHANGES = {
    "llama": {"dropout": 0.1, "remat": "full", "windows": (8, 0)},
    "gpt2": {"dropout": 0.1, "remat": "none"},
    "t5": {"dropout": 0.1, "remat": "minimal"},
}
OTHERS = {"dropout": 0.0, "remat": "dots", "windows": (0,)}
ACCUMULATED = {("llama", TWO): 2, ("gpt2", TWO): 2}  # config.loop.micro_batches
RUNS = [*CHANGES, "lora", "dpo beside a model", "grpo", "sft of t5"]
CASES = [("llama", TWO), ("t5", FOUR), ("lora", SLICES)]


@functools.cache
def _step(run: str, parts: int, mesh_name: str = "") -> Result:
    """On a mesh of MESHES, or on one device. parts: config.loop.micro_batches."""
    config, changes = _config(run), dict(CHANGES.get(run, OTHERS))
    config.loop.micro_batches = parts
    if run.startswith("dpo"):  # means: sums of some -150 are known to 1e-5 in float32, and so is their difference
        config.objective.dpo.length_normalized = True
    config.model.update({name: changes.pop(name) for name in ("dropout", "remat")})
    config.model.decoder.update(changes | {"layers": 8})
    if run.endswith("t5"):
        config.model.encoder.layers = 8
    config.mesh.preset = "data"
    if mesh_name:
        sizes, count, repeats = MESHES[mesh_name]
        config.mesh.update({"data": 1} | sizes)
        config.mesh.pipeline.update({"micro_batches": count, "repeats": repeats})
    with mock.patch.object(meshes, "_arrange", _over_slices if mesh_name == FOUR else meshes._arrange):
        return _stepped(run, config, jax.devices() if mesh_name else jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as meshes see it: one of two slices of 2 x 2 chips, which are numbered by turns."""

    id: int
    platform = "tpu"
    device_kind = "TPU v5 lite"
    core_on_chip = 0

    @property
    def slice_index(self) -> int:
        return self.id % 2

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id // 2 % 2, self.id // 4, 0


def _over_slices(shape, devices, arrange=meshes._arrange):
    """CPU devices in the places of the chips of two slices."""
    chips = arrange(shape, [Chip(number) for number in range(len(devices))])
    return np.vectorize(lambda chip: devices[chip.id])(chips)


def test_stages_over_slices_have_whole_stages_in_each():
    sizes = MeshConfig("data", "", **(dict.fromkeys(MESH_AXES) | {"data": 1} | MESHES[FOUR][0]))
    with mock.patch.object(meshes, "_arrange", _over_slices):
        mesh = meshes.make(sizes)
    ids = np.vectorize(lambda device: device.id)(mesh.devices).reshape(4, 2)
    assert (ids % 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def _fits(run: str, name: str) -> bool:
    """Half of the batch makes no more than one row for each part of a micro-batch on the first mesh, and stretches of
    one layer have no windows of a period of two."""
    return (run, name) != ("llama", FOUR) and (run != "gpt2" or name == TWO)


@pytest.mark.parametrize(
    "run,name",
    [
        pytest.param(run, name, marks=[pytest.mark.slow] * ((run, name) not in CASES))
        for run in RUNS
        for name in MESHES
        if _fits(run, name)
    ],
)
def test_stages_give_the_loss_and_every_gradient_of_one_device(run, name):
    parts = ACCUMULATED.get((run, name), 1)
    _assert_equal(_step(run, parts), _step(run, parts, name))
