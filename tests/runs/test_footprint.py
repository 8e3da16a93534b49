"""The memory of a train step by part: what can be counted by hand, and what XLA says of the same step."""

import dataclasses

import jax
import pytest

from t5x_like.configs.pretrain import test as config_file
from t5x_like.parallel import mesh as meshes
from t5x_like.parallel.rules import MESH_AXES
from t5x_like.parallel.sharding import device_bytes
from t5x_like.runs import program as programs
from t5x_like.runs import train as experiments
from t5x_like.runs.footprint import Footprints

LAYERS, ROWS, LENGTH, WIDTH, HEADS, HEAD, MLP = 3, 8, 128, 32, 4, 8, 64
BF16, FLOAT32 = 2, 4


def experiment(*, remat="full", **mesh):
    config = config_file.get_config()
    config.model.remat = remat
    config.model.decoder.layers = LAYERS
    config.data.update({"batch_size": ROWS, "length": LENGTH})
    config.mesh.update({"preset": "fsdp", **mesh})
    return experiments.from_config(config)


def sizes(**given):
    return dict.fromkeys(MESH_AXES, 1) | given


@pytest.fixture(scope="module")
def tpu():
    return Footprints(platform="tpu", kind="TPU v5")


def layers_share(footprints, mesh, **changed):
    """Bytes that the layers leave for the backward pass under a policy, and under none but their inputs."""
    policy, full = (footprints.of(experiment(remat=remat), mesh).saved for remat in (changed["remat"], "full"))
    return policy - full


def test_a_policy_saves_what_it_names(tpu):
    tokens, kv_heads, log_sums = ROWS // 4 * LENGTH, 2, HEADS * FLOAT32  # the kernel's, which its backward pass reads
    context = HEADS * HEAD * BF16 + log_sums
    assert layers_share(tpu, sizes(fsdp=4), remat="context") == LAYERS * tokens * context
    named = (HEADS + 2 * kv_heads) * HEAD + 2 * MLP
    assert layers_share(tpu, sizes(fsdp=4), remat="minimal") == LAYERS * tokens * (named * BF16 + context)


def test_full_remat_saves_the_input_of_each_layer(tpu):
    deeper = experiment()
    decoder = dataclasses.replace(deeper.model.decoder, layers=LAYERS + 5)
    deeper = dataclasses.replace(deeper, model=dataclasses.replace(deeper.model, decoder=decoder))
    more = tpu.of(deeper, sizes(fsdp=4)).saved - tpu.of(experiment(), sizes(fsdp=4)).saved
    assert more == 5 * ROWS // 4 * LENGTH * WIDTH * BF16


def test_tensor_parallelism_divides_heads_and_columns_but_no_input(tpu):
    # Twice the rows a device, and half the heads and columns of each.
    shares = [layers_share(tpu, sizes(fsdp=4 // n, tensor=n), remat="minimal") for n in (1, 2)]
    assert shares[0] == shares[1] > 0


def test_micro_batches_divide_what_is_saved_and_hold_two_gradients(tpu):
    whole, parts = experiment(), experiment()
    parts = dataclasses.replace(parts, loop=dataclasses.replace(parts.loop, micro_batches=2))
    one, two = (tpu.of(each, sizes(fsdp=4)) for each in (whole, parts))
    assert two.saved * 2 == one.saved
    assert (one.gradients, two.gradients) == (one.parameters, 2 * one.parameters)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_state_is_that_of_the_compiled_step(mesh):
    chosen = experiment(**mesh)
    real = meshes.make(chosen.mesh)
    with jax.set_mesh(real):
        program = programs.step_program(chosen, real)
        layout = program.layout
        compiled = program.step.lower(layout.state, layout.frozen, program.batch).compile()
    found = Footprints(platform="cpu", kind="cpu").of(chosen, sizes(**mesh))
    read = {name: array for name, array in program.batch.items() if name != "target_bytes"}  # that is for evaluations
    beside = device_bytes(read) + device_bytes(layout.state["progress"])
    assert found.state + beside == compiled.memory_analysis().argument_size_in_bytes


def test_a_mesh_that_does_not_divide_is_one_line(tpu):
    with pytest.raises(experiments.UsageError, match="not divisible by its 3 shards"):
        tpu.of(experiment(), sizes(tensor=3))


def test_the_base_of_an_adapter_has_no_optimizer():
    config = config_file.get_config()
    config.adapter.update({"name": "lora"})
    config.checkpoint.init_from = "somewhere"
    lora = Footprints(platform="tpu", kind="TPU v5").of(experiments.from_config(config), sizes(fsdp=4))
    assert lora.frozen > lora.parameters > 0
    assert lora.optimizer == pytest.approx(2 * lora.parameters, rel=0.01)
