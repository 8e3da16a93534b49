"""Answers of a policy: the same whatever is decoded beside them, and with the log-probabilities that training gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.core.types import ArraySpec
from t5x_like.data.tokenizers import vocabularies
from t5x_like.inference.sampling import GREEDY, Sampling
from t5x_like.objectives.grpo import GrpoConfig
from t5x_like.objectives.interface import policy
from t5x_like.parallel.sharding import tree_shardings
from t5x_like.rl.rollout import Shape, end_ids, rollout_batch, rollout_program
from t5x_like.rl.rows import RowShape, first_targets, from_rows, on_rows, text_arrays, token_arrays
from t5x_like.rl.scoring import scoring_function
from tests.layers.scoring.world import FAST, make_mesh
from tests.models import cases

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]
SAMPLES, NEW, ROOM, TEMPERATURE = 4, 10, 6, 0.7
ENDS = tuple(range(16, 28))
DRAW = Sampling(TEMPERATURE, 0, 1.0)
ALONE = {"data": 1}
START = 2


@functools.cache
def world(case):
    model = cases.model(case)
    return model, cases.random_params(model)


@functools.cache
def drawn(case, rows, mesh="one", iteration=3, sampling=DRAW, samples=1):
    """Answers to all prompts, `rows` at a time, of which `samples` share a prompt: {name: [16, ...]}."""
    model, params = world(case)
    source = ROOM if case == "t5" else 0
    shape = Shape(rows, samples, 1 if source else ROOM, source, NEW)
    devices = make_mesh({"data": 2, "fsdp": 2, "tensor": 2} if mesh == "eight" else ALONE)
    with jax.set_mesh(devices):
        program = rollout_program(policy(model), devices, shape, sampling=sampling, end_ids=ENDS, seed=0, options=FAST)
        params = jax.tree.map(jax.device_put, params, tree_shardings(devices, model.rules, model.specs()))
        prompt, sample = np.divmod(np.arange(len(PROMPTS) * SAMPLES), SAMPLES)
        parts = []
        for first in range(0, len(prompt), rows):
            here = slice(first, first + rows)
            ids = [PROMPTS[number] for number in prompt[here][::samples]]
            batch = rollout_batch(ids, shape, prompt=prompt[here], sample=sample[here], start=START)
            placed = {name: jax.device_put(array, program.batch[name].sharding) for name, array in batch.items()}
            parts.append(jax.device_get(program.run(params, {"base": {}}, placed, jnp.asarray(iteration, jnp.int32))))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_answers_do_not_depend_on_what_is_decoded_beside_them(case):
    whole = drawn(case, 16)
    assert len({tuple(row) for row in whole["tokens"]}) > 12, "all answers are alike: nothing is compared"
    part = drawn(case, 4)
    for name in ("tokens", "lengths", "stopped"):
        assert (part[name] == whole[name]).all(), name
    assert np.abs(part["logp"] - whole["logp"]).max() < 1e-5


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_answers_that_share_a_prompt_are_those_of_prompts_of_their_own(case):
    apart = drawn(case, 16)
    for shared in (drawn(case, 16, samples=SAMPLES), drawn(case, 16, "eight", samples=SAMPLES)):
        for name in ("tokens", "lengths", "stopped"):
            assert (shared[name] == apart[name]).all(), name
        assert np.abs(shared["logp"] - apart["logp"]).max() < 1e-5


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_answers_do_not_depend_on_the_mesh(case):
    one, eight = drawn(case, 16), drawn(case, 16, "eight")
    assert (one["tokens"] == eight["tokens"]).all() and (one["lengths"] == eight["lengths"]).all()
    assert np.abs(one["logp"] - eight["logp"]).max() < 1e-5


def test_each_iteration_and_each_sample_draws_anew():
    first, second = drawn("llama", 16), drawn("llama", 16, iteration=4)
    assert (first["tokens"] != second["tokens"]).any(axis=1).sum() > 12
    for group in first["tokens"].reshape(len(PROMPTS), SAMPLES, NEW):
        assert len({tuple(row) for row in group}) > 1


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_an_answer_ends_with_any_end_token_or_is_as_long_as_allowed(case):
    found = drawn(case, 16)
    ended = [row[length - 1] for row, length in zip(found["tokens"], found["lengths"], strict=True)]
    assert len(set(ended) & set(ENDS)) > 1, "no two kinds of end token came up"
    assert (~(found["stopped"] > 0)).any() and found["stopped"].any()
    for row, length, stopped, last in zip(found["tokens"], found["lengths"], found["stopped"], ended, strict=True):
        assert not set(row[: length - 1]) & set(ENDS)
        assert (last in ENDS) == bool(stopped) and (stopped or length == NEW)
        assert not row[length:].any()


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("case", ["llama", "t5"])
def test_log_probabilities_of_rollout_and_of_training_agree(case, micro_batches):
    """At the temperature of the rollout, for every token of every answer; without it they would not."""
    model, params = world(case)
    found = drawn(case, 16)
    source = ROOM if case == "t5" else 0
    shape = RowShape(NEW if source else ROOM + NEW - 1, source, START)
    ids = [PROMPTS[number // SAMPLES] for number in range(16)]
    batch = token_arrays(ids, found["tokens"], found["lengths"], shape)
    weights = batch.pop("loss_weights")
    assert weights.sum() == found["lengths"].sum()

    def scored(temperature):
        config = GrpoConfig(0.2, 0.2, 0.0, "none", "token", 0, temperature)
        axes = {name: ArraySpec(array.shape, "int32", ("batch", "length")) for name, array in batch.items()}
        score = scoring_function(policy(model), config, rules=model.rules, inputs=axes, micro_batches=micro_batches)
        logp = jax.jit(score, compiler_options=FAST)(
            params, {"base": {}}, {name: jnp.asarray(x) for name, x in batch.items()}
        )
        return from_rows(np.asarray(logp), found["lengths"], first_targets(ids, shape), NEW)

    assert np.abs(scored(TEMPERATURE) - found["logp"]).max() < 2e-5
    assert np.abs(scored(1.0) - found["logp"]).max() > 0.1


def test_greedy_answers_are_equal_within_a_group():
    found = drawn("llama", 16, sampling=GREEDY)
    for group in found["tokens"].reshape(len(PROMPTS), SAMPLES, NEW):
        assert (group == group[0]).all()


def test_rows_hold_prompt_and_answer_and_weigh_the_answer_alone():
    answers, lengths = np.array([[7, 8, 9], [5, 0, 0]]), np.array([3, 1])
    found = token_arrays([[1, 2], [3]], answers, lengths, RowShape(4, 0, 0))
    assert found["inputs"].tolist() == [[1, 2, 7, 8], [3, 0, 0, 0]]
    assert found["targets"].tolist() == [[2, 7, 8, 9], [5, 0, 0, 0]]
    assert found["loss_weights"].tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert found["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


def test_rows_of_an_encoder_decoder_hold_the_prompt_as_source():
    answers, lengths = np.array([[7, 8, 9], [5, 0, 0]]), np.array([3, 1])
    found = token_arrays([[1, 2], [3]], answers, lengths, RowShape(3, 2, 6))
    assert found["encoder_inputs"].tolist() == [[1, 2], [3, 0]]
    assert found["encoder_segment_ids"].tolist() == [[1, 1], [1, 0]]
    assert found["inputs"].tolist() == [[6, 7, 8], [6, 0, 0]]
    assert found["targets"].tolist() == [[7, 8, 9], [5, 0, 0]]
    assert found["loss_weights"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("judge", [None, 8], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("policy", ["decoder", "encoder-decoder"])
def test_a_reward_model_reads_the_text_that_it_was_trained_on(policy, judge):
    """Prompts of a policy with an encoder end with EOS (9 here); a reward model reads it where it has an encoder."""
    answers, lengths = np.array([[7, 6, 9], [5, 0, 0]]), np.array([3, 1])
    if policy == "decoder":
        prompts, shape = [[1, 2], [3]], RowShape(4, 0, 0, judge, 9)
    else:
        prompts, shape = [[1, 2, 9], [3, 9]], RowShape(3, 3, 6, judge, 9)
    found = text_arrays(prompts, answers, lengths, shape)
    if judge is None:
        assert found.pop("inputs").tolist() == [[1, 2, 7, 6, 9], [3, 5, 0, 0, 0]]
        assert found.pop("segment_ids").tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    else:
        assert found.pop("inputs").tolist() == [[8, 7, 6, 9], [8, 5, 0, 0]]
        assert found.pop("segment_ids").tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert found.pop("encoder_inputs").tolist() == [[1, 2, 9], [3, 9, 0]]
        assert found.pop("encoder_segment_ids").tolist() == [[1, 1, 1], [1, 1, 0]]
    assert not found


def test_a_text_of_prompt_and_answer_leaves_out_the_end_of_a_source_alone():
    answers, lengths = np.array([[7, 8, 9]]), np.array([3])
    found = text_arrays([[1, 2]], answers, lengths, RowShape(3, 2, 6, end=2))
    assert found["inputs"].tolist() == [[1, 7, 8, 9]]
    found = text_arrays([[1, 2]], answers, lengths, RowShape(3, 2, 6))
    assert found["inputs"].tolist() == [[1, 2, 7, 8, 9]]


def test_numbers_of_tokens_come_back_from_their_rows():
    values, lengths, first = np.arange(1.0, 7).reshape(2, 3).astype(np.float32), np.array([3, 1]), np.array([1, 0])
    rows = on_rows(values, lengths, first, 5)
    assert rows.tolist() == [[0, 1, 2, 3, 0], [4, 0, 0, 0, 0]]
    assert from_rows(rows, lengths, first, 3).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_end_tokens_are_named_by_text():
    bytes_alone = vocabularies.load("bytes")
    assert end_ids(("eos", "\n", "eos"), bytes_alone) == (bytes_alone.eos_id, *bytes_alone.encode("\n"))
    chat = bytes_alone.with_extra_ids(2)
    chat.specials["<|im_end|>"] = 258  # a token that no text gives
    assert end_ids(("eos", "<|im_end|>"), chat) == (chat.eos_id, 258)
    with pytest.raises(UsageError, match="'ab' is 2 tokens"):
        end_ids(("ab",), bytes_alone)
