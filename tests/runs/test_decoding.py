"""The programs that `plan --program=prefill` and `=decode` compile do what decoding does: run, on fake CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.pretrain import t5_tiny
from configs.pretrain import test as test_config
from t5x_like.layers.scoring.head import logits
from t5x_like.parallel import mesh as meshes
from t5x_like.runs import program as programs
from t5x_like.runs import train
from t5x_like.runs.roles import build_model

ROWS, LENGTH, SOURCE, READ, VOCAB = 4, 16, 12, 10, 250


def experiment(which):
    config = {"decoder": test_config, "encoder_decoder": t5_tiny}[which].get_config()
    config.data.length = LENGTH
    config.mesh.fsdp = 4
    if which == "encoder_decoder":
        config.data.encoder_length = SOURCE
    return train.from_config(config, overrides={})


@pytest.mark.parametrize("which", ["decoder", "encoder_decoder"])
def test_logits_of_prompts_and_of_one_more_token_are_those_of_the_whole_forward_pass(which):
    planned = experiment(which)
    mesh = meshes.make(planned.mesh, jax.devices()[:4])
    model = build_model(planned.model, rules=planned.mesh.rules, platform="cpu")
    prefill, (specs, prompts, _, source) = programs.prefill_program(planned, mesh, rows=ROWS, length=LENGTH)
    decode, (_, cache, *_) = programs.decode_program(planned, mesh, rows=ROWS, length=LENGTH)
    # The start token of an encoder-decoder; a decoder's prompts may have fewer tokens than there is room for.
    read = 1 if which == "encoder_decoder" else READ
    assert prompts.shape == (ROWS, 1 if which == "encoder_decoder" else LENGTH)
    numbers = np.random.default_rng(0)
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    tokens[:, : read + 1] = numbers.integers(3, VOCAB, (ROWS, read + 1))
    given = {}
    if source:
        given = {
            "encoder_inputs": numbers.integers(3, VOCAB, (ROWS, SOURCE)),
            "encoder_segment_ids": np.ones((ROWS, SOURCE)),
        }
        given = {name: jnp.asarray(array, jnp.int32) for name, array in given.items()}
    assert {name: array.shape for name, array in source.items()} == {name: array.shape for name, array in given.items()}
    tokens = jnp.asarray(tokens)

    def whole(params):
        return logits(*model.score_input(params, model.apply(params, {"inputs": tokens, **given})))

    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: spec.sharding, specs)
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
        expected = jax.jit(whole)(params)[..., :VOCAB]  # the rest is padding
        lengths = jnp.full(ROWS, read, jnp.int32)
        first, filled = prefill(params, tokens[:, : prompts.shape[1]], lengths, given)
        assert jax.tree.map(lambda array: array.shape, filled) == jax.tree.map(lambda spec: spec.shape, cache)
        second, _ = decode(params, filled, tokens[:, read], lengths)
    assert float(jnp.abs(expected[:, read] - expected[:, read - 1]).max()) > 1e-3
    np.testing.assert_allclose(first[:, :VOCAB], expected[:, read - 1], atol=2e-5)
    np.testing.assert_allclose(second[:, :VOCAB], expected[:, read], atol=2e-5)
