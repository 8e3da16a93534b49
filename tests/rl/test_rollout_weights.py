"""Where the policy lies while it answers: gathered once, or as in training; the answers are the same."""

import functools

import jax
import numpy as np
import pytest

from configs.rl import test as tested
from t5x_like.planner.cost import cost
from t5x_like.rl.rollout import rollout_batch
from t5x_like.runs import program as programs
from t5x_like.runs import rl_program, train
from t5x_like.runs.functions import named_functions
from tests.layers.scoring.world import FAST, make_mesh

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
PROMPTS = [[3], [4], [5], [6]]


@functools.cache
def drawn(weights: str, adapter: str = "none"):
    """(answers of random parameters by name, the cost of the program that drew them)."""
    config = tested.get_config()
    config.rl.weights = weights
    config.adapter.name = adapter
    config.checkpoint.init_from = None if adapter == "none" else "a model"
    experiment = train.built(rl_program.RlExperiment, named_functions(config.to_dict())[0])
    mesh = make_mesh(MESH)
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        rollout = rl_program.rl_programs(experiment, program, end_ids=(7,)).sample
        state, frozen = programs.initialize(program, seed=3)
        ids = [prompt for prompt in PROMPTS for _ in range(4)]
        prompt, sample = np.divmod(np.arange(16), 4)
        batch = rollout_batch(ids, rollout.shape, prompt=prompt, sample=sample, start=0)
        placed = {name: jax.device_put(array, rollout.batch[name].sharding) for name, array in batch.items()}
        number = jax.device_put(np.int32(0), rollout.iteration.sharding)
        compiled = rollout.run.lower(state["params"], frozen, placed, number).compile(FAST)
        answers = jax.device_get(compiled(state["params"], frozen, placed, number))
    return answers, cost(compiled.as_text(), dict(mesh.shape))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_gathered_weights_give_the_same_answers(adapter):
    once, each = drawn("gathered", adapter)[0], drawn("sharded", adapter)[0]
    assert len({tuple(row) for row in once["tokens"]}) > 12, "all answers are alike: nothing is compared"
    for name in ("tokens", "lengths", "stopped"):
        assert (once[name] == each[name]).all(), name
    assert np.abs(once["logp"] - each["logp"]).max() < 1e-5


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_gathered_weights_are_not_gathered_again_for_every_token(adapter):
    new = tested.get_config().rl.new_tokens
    found = {}
    for weights in ("gathered", "sharded"):
        items = drawn(weights, adapter)[1].collectives
        found[weights] = sum(item.count >= new for item in items if item.kind == "all-gather" and "fsdp" in item.axes)
    assert found["gathered"] == 0 < found["sharded"]
