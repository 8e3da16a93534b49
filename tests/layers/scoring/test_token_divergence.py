"""The divergence of two heads against its definition in float64: values, gradients, meshes, collectives, memory."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5x_like.core.errors import UsageError
from t5x_like.layers.scoring.head import Head
from t5x_like.layers.scoring.token_divergence import KINDS, token_divergence
from tests.layers.scoring.world import FAST, MESHES, REAL, TABLE, B, D, T, V, count, make_mesh

E = 24  # width of the teacher
TEMPERATURE, SOFTCAP, SCALE = 2.0, 3.0, 0.7


@functools.cache
def arrays(length=T):
    random = np.random.default_rng(1)
    student = [random.standard_normal(shape).astype(np.float32) for shape in ((B, length, D), (V, D), (V,))]
    teacher = [random.standard_normal(shape).astype(np.float32) for shape in ((B, length, E), (V, E))]
    return student, teacher, random.standard_normal((B, length)).astype(np.float32)


@functools.cache
def expected(kind):
    """(divergence, gradients of the student's x, weight and bias), by torch."""
    student, teacher, cotangents = arrays()
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in student]
    x, weight = (torch.tensor(a, dtype=torch.float64) for a in teacher)
    logits = SOFTCAP * torch.tanh((SCALE * torch.einsum("BTD,VD->BTV", *leaves[:2]) + leaves[2]) / SOFTCAP)
    log_p = torch.log_softmax(logits[:, :, :REAL] / TEMPERATURE, -1)
    log_q = torch.log_softmax(torch.einsum("BTD,VD->BTV", x, weight)[:, :, :REAL] / TEMPERATURE, -1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    halves = (p * (log_p - log_m)).sum(-1) / 2 + (q * (log_q - log_m)).sum(-1) / 2
    forward, reverse = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
    value = {"forward_kl": forward, "reverse_kl": reverse, "jensen_shannon": halves}[kind]
    gradients = torch.autograd.grad((value * torch.tensor(cotangents)).sum(), leaves)
    return value.detach().numpy(), [gradient.numpy() for gradient in gradients]


def total(student, teacher, cotangents, *, kind, chunk):
    x_BTD, weight_VD, bias_V = student
    head = Head(weight=weight_VD, bias=bias_V, vocab_size=REAL, softcap=SOFTCAP, rules=TABLE, scale=SCALE)
    head_teacher = Head(weight=teacher[1], bias=None, vocab_size=REAL, softcap=None, rules=TABLE)
    found = token_divergence(x_BTD, head, teacher[0], head_teacher, kind=kind, temperature=TEMPERATURE, chunk=chunk)
    return jnp.sum(cotangents * found), found


def step(kind, chunk):
    run = functools.partial(total, kind=kind, chunk=chunk)
    return jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), compiler_options=FAST)


@pytest.mark.parametrize("name", [None, "fsdp8", "tensor8", "data2_fsdp2_tensor2"])
@pytest.mark.parametrize("chunk", [0, 5], ids=["kept", "chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_every_gradient_are_those_of_the_definition(kind, chunk, name):
    with jax.set_mesh(make_mesh(MESHES[name])) if name else contextlib.nullcontext():
        (_, found), (gradients, of_teacher) = step(kind, chunk)(*arrays())
    value, references = expected(kind)
    assert value.min() > 0.05
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for gradient, reference in zip(gradients, references, strict=True):
        assert np.abs(reference).max() > 1e-3
        assert np.abs(gradient - reference).max() <= 1e-5 * np.abs(reference).max()
    assert all(np.all(np.asarray(gradient) == 0) for gradient in of_teacher)


def test_a_model_does_not_diverge_from_itself():
    x, weight, bias = map(jnp.asarray, arrays()[0])
    head = Head(weight=weight, bias=bias, vocab_size=REAL, softcap=None, rules=TABLE)
    for kind in KINDS:
        assert np.abs(token_divergence(x, head, x, head, kind=kind)).max() < 1e-6


def test_each_head_is_gathered_once_a_direction_whatever_the_number_of_chunks():
    counts = []
    for chunk in (3, 6):
        with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
            text = step("forward_kl", chunk).lower(*arrays()).compile().as_text()
        assert "while" in text
        counts.append(count(text))
    assert counts[0] == counts[1]
    assert counts[0]["reduce-scatter"] == 1 and counts[0]["all-gather"] <= 6  # 2 heads, 2 directions; what is returned


def test_memory_does_not_grow_to_full_logits():
    sizes = [
        step("reverse_kl", chunk).lower(*arrays(512)).compile().memory_analysis().temp_size_in_bytes
        for chunk in (64, 0)
    ]
    full = 4 * B * 512 * V
    assert sizes[0] < full / 2 < full <= sizes[1]


def test_heads_of_two_vocabularies_are_refused():
    x, weight, bias = map(jnp.asarray, arrays()[0])
    head = Head(weight=weight, bias=bias, vocab_size=REAL, softcap=None, rules=TABLE)
    with pytest.raises(UsageError, match="250 and 240 tokens; a divergence needs models with the same tokenizer"):
        token_divergence(x, head, x, dataclasses.replace(head, vocab_size=240), kind="forward_kl")
    wide = dataclasses.replace(head, weight=jnp.pad(weight, ((0, 8), (0, 0))), bias=None)
    with pytest.raises(UsageError, match="256 and 264 rows with padding; give both models the same vocab_multiple"):
        token_divergence(x, head, x, wide, kind="forward_kl")
