"""The kernels of accelerators: splash in interpret mode and compiled for a TPU, what cuDNN is asked for, and on a GPU
cuDNN itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.layers.attention import kernels
from t5x_like.layers.attention.biases import Alibi
from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.parallel import mesh as mesh_module
from t5x_like.parallel import rules
from t5x_like.parallel.sharding import named, use_rules
from t5x_like.planner.compile import compile_program
from t5x_like.planner.time.cost import cost
from t5x_like.planner.topology import topology
from tests.layers.attention.definition import (
    PREFIX,
    SEGMENTS,
    arrays,
    assert_same,
    make_mesh,
    reference,
    run,
    seen_by_definition,
    spec,
    with_gradients,
)

SPLASH = {
    "causal": ({}, {}, 2),
    "full": ({}, {"causal": False}, 4),
    "window_softcap": ({}, {"window": 100, "softcap": 2.0}, 1),
    "data2_segments": ({"data": 2}, {"segments": True}, 2),
    "tensor4_replicated_kv_heads": ({"tensor": 4}, {}, 2),
    "sequence2_tensor2_segments": ({"sequence": 2, "tensor": 2}, {"segments": True, "window": 150}, 2),
}
TWO_AXES = "length=sequence+tensor,act_heads=,act_kv_heads="
# Causal rows long enough that shards exchange halves of their queries.
EXCHANGED = {
    "softcap": ({"sequence": 2}, {"length": 512, "softcap": 2.0}, 2),
    "tensor4_replicated_kv_heads": ({"sequence": 2, "tensor": 4}, {"length": 512}, 2),
    "odd_segments": ({"sequence": 3}, {"length": 768, "segments": True}, 4),
    "window_segments": ({"sequence": 2, "data": 2}, {"length": 512, "segments": True, "window": 400}, 1),
    "over_two_axes": (
        {"sequence": 2, "tensor": 2},
        {"length": 1024, "rules": "length=sequence+tensor,act_heads=,act_kv_heads="},
        2,
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        *SPLASH,
        *(
            pytest.param(f"exchanged {name}", marks=[pytest.mark.slow] * (name in ("softcap", "over_two_axes")))
            for name in EXCHANGED
        ),
    ],
)
def test_splash_equals_the_definition(name):
    sizes, case, kv_heads = SPLASH[name] if name in SPLASH else EXCHANGED[name.removeprefix("exchanged ")]
    case = {"length": 256, "softcap": None, "rules": ""} | case
    length, softcap, table = case.pop("length"), case.pop("softcap"), rules.rules(case.pop("rules"))
    q, k, v, g = arrays(rows=2, length=length, heads=4, kv_heads=kv_heads, head=128)
    if "segments" in case:
        case["segments"] = np.sort(np.random.default_rng(0).integers(0, 3, (2, length)))[:, ::-1].astype(np.int32)

    def function(q, k, v):
        with use_rules(table):
            assert not kernels.why_not_splash(q, k, spec(**case), bias=False)
            return kernels.splash(q, k, v, spec(**case), scale=0.1, softcap=softcap, interpret=True)

    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        assert ("ppermute" in str(jax.make_jaxpr(function)(q, k, v))) == (name not in SPLASH)
        results = run(function, q, k, v, g)
    seen = seen_by_definition(2, length, **case)
    expected = run(functools.partial(reference, seen_BTS=seen, scale=0.1, softcap=softcap), q, k, v, g)
    assert_same(results, expected)


@pytest.mark.slow
def test_blocks_of_any_size_give_the_same():
    q, k, v, g = arrays(rows=1, length=256, heads=2, kv_heads=1, head=128)

    def function(block):
        return lambda q, k, v: kernels.splash(q, k, v, spec(), scale=0.1, softcap=None, block=block, interpret=True)

    assert_same(run(function(128), q, k, v, g), run(function(256), q, k, v, g))


def test_heads_split_over_other_axes_than_kv_heads_is_an_error():
    q, k, v, _ = arrays(length=128, heads=8, kv_heads=4)
    table = rules.rules("act_kv_heads=sequence,length=")

    def function(q, k, v):
        with use_rules(table):
            return kernels.splash(q, k, v, spec(), scale=1.0, softcap=None)

    with jax.set_mesh(make_mesh({"sequence": 2, "tensor": 2})), pytest.raises(UsageError, match="split alike"):
        jax.jit(function).lower(q, k, v)


CUDNN = {
    "causal": ({}, {}, 2),
    "one_kv_head": ({}, {}, 1),
    "full": ({}, {"causal": False}, 4),
    "window": ({}, {"window": 5}, 2),
    "prefix": ({}, {"prefix": PREFIX}, 2),
    "data2_segments": ({"data": 2}, {"segments": SEGMENTS}, 2),
    "tensor2_segments_window": ({"tensor": 2}, {"segments": SEGMENTS, "window": 7}, 2),
    "sequence2": ({"sequence": 2}, {"segments": SEGMENTS}, 4),
    "tensor2_bias": ({"tensor": 2}, {"bias": True}, 2),
    "sequence2_bias": ({"sequence": 2}, {"causal": False, "bias": True}, 2),
}


SLOPES = np.array([2.0, 0.5, 0.1, 0.02], np.float32)


def cudnn(q, k, v, case):
    case = dict(case)
    bias = Alibi(jnp.asarray(SLOPES)) if case.pop("bias", False) else None
    with use_rules(rules.rules()):
        assert not kernels.why_not_cudnn(
            q.astype(jnp.bfloat16),
            k.astype(jnp.bfloat16),
            spec(**case),
            softcap=False,
            bias=bias is not None,
            compute_capability=None,
        )
        return kernels.cudnn(q, k, v, spec(**case), scale=0.3, bias=bias)


def by_definition(case):
    """The reference with the mask and the bias of a case."""
    case = dict(case)
    bias = None
    if case.pop("bias", False):
        distances = np.abs(np.arange(24)[:, None] - np.arange(24))
        bias = jnp.asarray(-SLOPES[:, None, None] * distances)[None]
    return functools.partial(reference, seen_BTS=seen_by_definition(4, 24, **case), scale=0.3, bias=bias)


@pytest.mark.parametrize("name", CUDNN)
def test_what_cudnn_is_asked_for_is_the_definition(name, monkeypatch):
    """The same call with XLA's implementation in the place of the kernel: arguments, masks and places on the mesh."""
    asked = []
    plain = jax.nn.dot_product_attention

    def with_xla(*arguments, implementation, **options):
        asked.append(implementation)
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    sizes, case, kv_heads = CUDNN[name]
    q, k, v, g = arrays(kv_heads=kv_heads)
    with jax.set_mesh(make_mesh(sizes)):
        results = run(functools.partial(cudnn, case=case), q, k, v, g)
    assert set(asked) == {"cudnn"}
    assert_same(results, run(by_definition(case), q, k, v, g))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_is_the_definition(name):
    """On one GPU, in bfloat16, against the definition in float32: packed rows, prefixes and position biases too."""
    _, case, kv_heads = CUDNN[name]
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in arrays(kv_heads=kv_heads, head=64))
    results = jax.jit(functools.partial(with_gradients, functools.partial(cudnn, case=case)))(q, k, v, g)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    expected = with_gradients(by_definition(case), *wide)
    assert_same([np.asarray(x, np.float32) for x in results], expected, bound=2e-2)


def test_splash_compiles_for_a_tpu_that_is_not_there():
    """Grouped heads, segments and a split sequence, forward and backward: keys and values cross the network once a
    direction, and only along the sequence. Halves of queries, of their segments, of outputs and of the gradients of
    both go to the mirror shard or come back."""
    pytest.importorskip("libtpu", reason="libtpu is not installed (extra [tpu])")
    mesh = mesh_module.make(
        mesh_module.MeshConfig("fsdp", "", None, None, None, 2, None, 2, 2), topology("v5e:2x4").devices
    )
    shapes = (4, 512, 8, 128), (4, 512, 4, 128), (4, 512, 4, 128)
    axes = [("batch", "length", heads, "head") for heads in ("act_heads", "act_kv_heads", "act_kv_heads")]
    table = rules.rules()
    q, k, v = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=named(mesh, table, names, shape))
        for shape, names in zip(shapes, axes, strict=True)
    )
    segments = jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=named(mesh, table, ("batch", "length"), (4, 512)))

    def function(q, k, v, segments):
        mask = MaskSpec(causal=True, q_segments_BT=segments, k_segments_BS=segments)
        with use_rules(table):
            return with_gradients(lambda *x: attention(*x, mask, scale=0.1), q, k, v, q)

    text = compile_program(jax.jit(function), (q, k, v, segments), mesh=mesh).text
    kernels_called = set(re.findall(r"splash_mha_(?:fwd|dq|dkv)", text))
    assert kernels_called == {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"}
    found = [(item.kind, item.axes) for item in cost(text, dict(mesh.shape)).collectives for _ in range(item.count)]
    expected = {"all-gather": 3, "collective-permute": 5, "reduce-scatter": 2}
    assert sorted(found) == [(kind, ("sequence",)) for kind, times in expected.items() for _ in range(times)]
