"""Models that are no family yet are one config each: what they compute is what transformers computes.

Logits and every gradient of BERT, Gemma 2, GPT-NeoX, BLOOM, OLMo 2, layers without positions and scaled rotary
positions, from the same random weights; then what only we have: prefixes in packed rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.layers.scoring.head import logits
from t5x_like.models.config import resolve
from t5x_like.models.model import Model
from t5x_like.parallel.rules import rules
from tests.models import cases


def composed(fields):
    config = resolve(cases.section(size="custom", **(cases.SIZE | fields)))
    return Model(config, rules(), DtypePolicy("float32", "float32"))


@pytest.fixture(scope="module")
def others():
    pytest.importorskip("transformers", reason="needs torch and transformers")
    pytest.importorskip("torch")
    from tests.models import other_architectures

    return other_architectures


NAMES = ("bert", "gemma2", "gpt_neox", "bloom", "olmo2", "smollm3_without_rope", "llama_linear_rope", "llama_yarn_rope")


@pytest.fixture(scope="module", params=NAMES)
def both(others, request):
    """(other, model, params, logits and gradients of ours, theirs), of two rows of 24 tokens."""
    import torch

    table = others.OTHERS | others.scaled_ropes({"linear": cases.LINEAR, "yarn": cases.YARN})
    other = table[request.param]
    model = composed(other.fields)
    params = cases.random_params(model)
    batch, targets = {"inputs": cases.tokens(model, 2, 24, seed=1)}, cases.tokens(model, 2, 24, seed=2)
    types = np.random.default_rng(3).integers(0, 2, (2, 24)).astype(np.int32)
    if "token_types" in model.inputs:
        batch["token_types"] = jnp.asarray(types)

    def loss(params):
        values = logits(*model.score_input(params, model.apply(params, batch)))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(values), targets[..., None], axis=-1)
        return -chosen.mean(), values[..., : model.config.vocab_size]

    gradients, ours = jax.jit(jax.grad(loss, has_aux=True))(params)
    theirs = others.load(other, model.config, params)
    arguments = {"token_type_ids": torch.from_numpy(types).long()} if "token_types" in batch else {}
    output = theirs(torch.from_numpy(np.array(batch["inputs"])).long(), **arguments).logits
    entropy = torch.nn.functional.cross_entropy(
        output.flatten(0, 1), torch.from_numpy(np.array(targets)).long().flatten()
    )
    entropy.backward()
    expected = {name: value.grad.numpy() for name, value in theirs.named_parameters() if value.grad is not None}
    return other, model, (ours, gradients), (output.detach().numpy(), expected)


def test_logits_equal(both):
    _, _, (ours, _), (theirs, _) = both
    assert cases.largest_difference(ours, theirs) <= 1e-5


def test_every_gradient_equals(both):
    other, model, (_, gradients), (_, theirs) = both
    ours = other.state(model.config, jax.tree.map(np.asarray, gradients))
    assert set(ours) == set(theirs)
    differences = {name: cases.largest_difference(ours[name], theirs[name]) for name in theirs}
    # The gradients of the biases of keys are zero but for rounding: a softmax does not see what all keys share.
    no_signal = {name for name in theirs if name.endswith("self.key.bias")}
    assert all(np.abs(ours[name]).max() < 1e-6 for name in no_signal)
    found = {name: value for name, value in differences.items() if name not in no_signal}
    assert max(found.values()) <= 1e-5, sorted(found.items(), key=lambda item: -item[1])[:5]


def test_padding_by_segments_is_the_attention_mask_of_bert(others):
    import torch

    other = others.OTHERS["bert"]
    model = composed(other.fields)
    params = cases.random_params(model)
    ids = cases.tokens(model, 2, 24)
    real = np.arange(24)[None] < np.array([[24], [15]])
    batch = {"inputs": ids, "segment_ids": jnp.asarray(real, jnp.int32)}
    ours = logits(*model.score_input(params, jax.jit(model.apply)(params, batch)))[..., : model.config.vocab_size]
    theirs = others.load(other, model.config, params)
    with torch.no_grad():
        ids = torch.from_numpy(np.array(ids)).long()
        masked = theirs(ids, attention_mask=torch.from_numpy(real).long()).logits.numpy()
        whole = theirs(ids).logits.numpy()
    assert cases.largest_difference(ours[0], whole[0]) <= 1e-5
    assert cases.largest_difference(ours[1, :15], masked[1, :15]) <= 1e-5
    assert cases.largest_difference(whole[1, :15], masked[1, :15]) > 1e-3


def test_parallel_branches_of_one_norm_and_scaled_logits_are_those_of_cohere(others):
    import torch

    model = composed(others.COHERE.fields)
    params = cases.random_params(model)
    norms = params["layers"]
    norms["mlp_norm"] = norms["attention_norm"]
    for norm in (norms["attention_norm"], params["final_norm"]):
        norm["bias"] = jnp.zeros_like(norm["bias"])
    ids = cases.tokens(model, 2, 24)
    ours = logits(*model.score_input(params, jax.jit(model.apply)(params, {"inputs": ids})))
    with torch.no_grad():
        theirs = others.load(others.COHERE, model.config, params)(torch.from_numpy(np.array(ids)).long()).logits.numpy()
    assert cases.largest_difference(ours[..., : model.config.vocab_size], theirs) <= 1e-5


@pytest.mark.parametrize("case", ["llama", "local_and_global"])
def test_a_prefix_in_a_packed_row_is_what_it_is_alone(case):
    model = cases.model(case)
    params = cases.random_params(model)
    run = jax.jit(lambda **batch: model.apply(params, batch).hidden_BTD)
    ids, lengths, prefixes = np.array(cases.tokens(model, 1, 24)), (10, 9), (4, 6)  # and 5 tokens of padding
    packed = {name: np.zeros((1, 24), np.int32) for name in ("segment_ids", "positions", "prefix")}
    alone, first = [], 0
    for number, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True), 1):
        at = slice(first, first + length)
        packed["segment_ids"][0, at], packed["positions"][0, at] = number, np.arange(length)
        packed["prefix"][0, first : first + prefix] = 1
        seen = (np.arange(length) < prefix)[None].astype(np.int32)
        alone.append(run(inputs=ids[:, at], prefix=seen))
        causal = run(inputs=ids[:, at])
        assert np.abs(causal - alone[-1])[:, : prefix - 1].max() > 0.01  # the prefix sees its own future
        first += length
    found = run(inputs=ids, **packed)
    np.testing.assert_allclose(found[:, :first], np.concatenate(alone, axis=1), atol=2e-5)
