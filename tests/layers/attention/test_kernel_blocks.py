"""cuDNN's kernel in blocks of queries, for masks that would be large matrices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.layers.attention import kernels
from t5x_like.layers.attention.masks import MaskSpec
from tests.layers.attention.definition import (
    arrays,
    assert_same,
    make_mesh,
    reference,
    run,
    seen_by_definition,
    with_gradients,
)
from tests.layers.attention.test_kernels import cudnn

BLOCKED = {
    "segments": ({}, {"segments": True}, 2),
    "segments_window": ({}, {"segments": True, "window": 70}, 2),
    "prefix": ({}, {"prefix": True}, 1),
    "both_ways_window": ({}, {"causal": False, "window": 70}, 4),
    "data2": ({"data": 2}, {"segments": True}, 2),
    "sequence2": ({"sequence": 2}, {"segments": True}, 4),
}


def blocked(name):
    """(sizes of the mesh, the case with its arrays, kv heads): rows of 512, three blocks of queries and more."""
    sizes, case, kv_heads = BLOCKED[name]
    random, case = np.random.default_rng(0), dict(case)
    if "segments" in case:
        case["segments"] = np.sort(random.integers(0, 4, (2, 512)))[:, ::-1].astype(np.int32)
    if "prefix" in case:
        case["prefix"] = random.random((2, 512)) < 0.1
    return sizes, case, kv_heads


@pytest.mark.parametrize("name", BLOCKED)
def test_cudnn_in_blocks_of_queries_is_the_definition(name, monkeypatch):
    plain, asked = jax.nn.dot_product_attention, []

    def with_xla(*arguments, implementation, mask, **options):
        asked.append(mask.shape)
        return plain(*arguments, implementation="xla", mask=mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    monkeypatch.setattr(kernels, "MASK_BYTES", 2**17)
    sizes, case, kv_heads = blocked(name)
    q, k, v, g = arrays(rows=2, length=512, kv_heads=kv_heads)
    with jax.set_mesh(make_mesh(sizes)):
        results = run(functools.partial(cudnn, case=case), q, k, v, g)
    assert {shape[2] for shape in asked} == {128}
    # Keys that a block cannot see are left out, unless the sequence is split or a prefix may be there.
    whole = "sequence" in sizes or "prefix" in case
    assert min(shape[3] for shape in asked) == (512 if whole else 128 if case.get("causal", True) else 256)
    assert not [shape for shape in asked if shape[2] % 2 or shape[3] % 2]  # cuDNN takes a matrix of even sides alone
    expected = functools.partial(reference, seen_BTS=seen_by_definition(2, 512, **case), scale=0.3)
    assert_same(results, run(expected, q, k, v, g))


def test_packed_rows_on_a_gpu_hold_no_matrix_of_the_whole_row(monkeypatch):
    """The program for a GPU that is not there, forward and backward: the largest mask is that of one block of queries,
    and each block's kernel runs once forward, once backward."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    rows, length = 2, 8192
    q, k = (jax.ShapeDtypeStruct((rows, length, heads, 128), jnp.bfloat16) for heads in (8, 2))
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def function(q, k, v, g, segments):
        mask = MaskSpec(causal=True, q_segments_BT=segments, k_segments_BS=segments)
        assert kernels.cudnn_blocks(q, k, mask) == 4
        return with_gradients(lambda *x: kernels.cudnn(*x, mask, scale=0.1), q, k, v, g)

    text = jax.jit(function).trace(q, k, k, q, segments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(", text)
    assert sorted(calls) == ["__cudnn$fmhaScaleBiasSoftmax"] * 4 + ["__cudnn$fmhaScaleBiasSoftmaxBackward"] * 4
    shapes = {tuple(map(int, found.split("x")[:-1])) for found in re.findall(r"tensor<([\dx]+x)\w+>", text)}
    assert not [shape for shape in shapes if shape.count(length) > 1]
    matrices = [shape for shape in shapes if len(shape) > 2 and shape[-1] > 128 and shape[-2] > 128]
    assert max(np.prod(shape) for shape in matrices) == rows * 2048 * length


@pytest.mark.gpu
@pytest.mark.parametrize("name", BLOCKED)
def test_cudnn_in_blocks_of_queries_is_the_definition_on_a_gpu(name, monkeypatch):
    monkeypatch.setattr(kernels, "MASK_BYTES", 2**17)
    _, case, kv_heads = blocked(name)
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in arrays(rows=2, length=512, kv_heads=kv_heads, head=64))
    results = jax.jit(functools.partial(with_gradients, functools.partial(cudnn, case=case)))(q, k, v, g)
    expected = functools.partial(reference, seen_BTS=seen_by_definition(2, 512, **case), scale=0.3)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    assert_same([np.asarray(x, np.float32) for x in results], with_gradients(expected, *wide), bound=2e-2)
