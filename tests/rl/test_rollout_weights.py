"""Where the policy lies while it answers, gathered once or as in training: the answers are the same.

That it is gathered once is seen in tests/planner/test_plan_rl.py, by the compiler that it matters to.
"""

import jax
import numpy as np

from configs.rl import test as tested
from t5x_like.rl.rollout import rollout_batch
from t5x_like.runs import program as programs
from t5x_like.runs import rl_program, train
from t5x_like.runs.functions import named_functions
from tests.layers.scoring.world import FAST, make_mesh

PROMPTS = [[3], [4], [5], [6]]


def drawn(weights: str):
    """(answers of random parameters with an adapter; the program as it was lowered)."""
    config = tested.get_config()
    config.rl.weights = weights
    config.adapter.name = "lora"  # so that both what is trained and what is frozen has parts of matrices
    config.checkpoint.init_from = "a model"
    experiment = train.built(rl_program.RlExperiment, named_functions(config.to_dict())[0])
    mesh = make_mesh({"data": 1, "fsdp": 2})
    with jax.set_mesh(mesh):
        program = programs.step_program(experiment, mesh)
        rollout = rl_program.rl_programs(experiment, program, end_ids=(7,)).sample
        state, frozen = programs.initialize(program, seed=3)
        ids = [prompt for prompt in PROMPTS for _ in range(4 // rollout.shape.samples)]
        prompt, sample = np.divmod(np.arange(16), 4)
        batch = rollout_batch(ids, rollout.shape, prompt=prompt, sample=sample, start=0)
        placed = {name: jax.device_put(array, rollout.batch[name].sharding) for name, array in batch.items()}
        number = jax.device_put(np.int32(0), rollout.iteration.sharding)
        lowered = rollout.run.lower(state["params"], frozen, placed, number)
        answers = jax.device_get(lowered.compile(FAST)(state["params"], frozen, placed, number))
    return answers, lowered.as_text()


def test_gathered_weights_give_the_same_answers():
    (once, gathered), (each, sharded) = drawn("gathered"), drawn("sharded")
    assert gathered != sharded, "the programs are one: nothing is compared"
    assert len({tuple(row) for row in once["tokens"]}) > 12, "all answers are alike: nothing is compared"
    for name in ("tokens", "lengths", "stopped"):
        assert (once[name] == each[name]).all(), name
    assert np.abs(once["logp"] - each["logp"]).max() < 1e-5
