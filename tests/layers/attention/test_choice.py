"""Which path attention takes, and the reason that it gives."""

import jax
import jax.numpy as jnp
import pytest

from t5x_like.layers.attention.choice import attention
from t5x_like.layers.attention.masks import MaskSpec
from t5x_like.layers.platform import platform
from t5x_like.parallel import rules
from t5x_like.parallel.sharding import use_rules
from tests.layers.attention.definition import arrays, make_mesh, path, spec


def test_each_path_says_why_it_was_taken():
    q, k = (jax.ShapeDtypeStruct((4, 4096, heads, 128), jnp.bfloat16) for heads in (8, 2))
    short = [jax.ShapeDtypeStruct((4, 4100, heads, 128), jnp.bfloat16) for heads in (8, 2)]
    one = jnp.ones((1, 1), jnp.int32)
    prefix = MaskSpec(causal=True, k_prefix_BS=jnp.ones((1, 1), bool))
    placed = MaskSpec(causal=True, q_positions_BT=one, k_positions_BS=one)
    packed = MaskSpec(causal=True, window=64, q_segments_BT=one, k_segments_BS=one)
    assert path(q, k, packed, platform="tpu")[0] == "splash"
    assert path(*short, packed, platform="tpu") == ("blockwise", "no splash: length 4100 is no multiple of 128")
    name, reason = path(*short, packed, platform="tpu", softcap=True)
    assert name == "materialised" and "4100 is no multiple of 128" in reason and "softcap" in reason
    assert path(q, k, prefix, platform="tpu") == ("blockwise", "no splash: a prefix that all queries see")
    assert path(q, k, packed, platform="tpu", bias=True) == ("blockwise", "no splash: a position bias")
    assert path(short[0], k, spec(causal=False), platform="tpu")[0] == "blockwise"
    assert path(short[0], k, spec(), platform="tpu")[0] == "materialised"
    assert path(q, k, placed, platform="tpu")[0] == "materialised"
    assert path(q, k, packed, platform="gpu") == (
        "cudnn",
        "cuDNN's flash attention kernel, its mask a matrix for each of 2 blocks of queries",
    )
    odd = [jax.ShapeDtypeStruct((4, 4097, heads, 128), jnp.bfloat16) for heads in (8, 2)]
    assert path(*odd, packed, platform="gpu")[0] == "blockwise"  # cuDNN refuses such a mask
    assert path(q, k, packed, platform="gpu", softcap=True) == (
        "materialised",
        "no cuDNN: a softcap; not blockwise: a softcap",
    )
    wide = [jax.ShapeDtypeStruct((4, 4096, 8, 256), jnp.bfloat16)] * 2
    assert path(*wide, spec(), platform="gpu") == ("blockwise", "no cuDNN: head size 256 is no multiple of 8 up to 128")
    assert path(*wide, spec(), platform="gpu", capability=8.9)[0] == "blockwise"
    assert path(*wide, spec(), platform="gpu", capability=9.0)[0] == "cudnn"
    assert path(q, k, spec(), platform="gpu", bias=True)[0] == "cudnn"
    assert path(q, k, packed, platform="gpu", bias=True)[0] == "blockwise"
    assert path(q, k, packed, platform="cpu")[0] == "blockwise"
    assert path(q, k, spec(window=jnp.int32(3)), platform="cpu") == (
        "materialised",
        "not blockwise: the window is traced",
    )


@pytest.mark.parametrize(
    ("sizes", "overrides", "split"),
    [
        ({"sequence": 2}, "", True),
        ({"sequence": 2}, "length=", False),
        ({"data": 2}, "", False),
        ({"data": 2}, "length=data, batch=slice", True),
    ],
)
def test_blocks_of_queries_serve_rows_that_the_rules_do_not_split(sizes, overrides, split):
    q, k, v, _ = arrays()

    def function(q, k, v):
        with use_rules(rules.rules(overrides)):
            return attention(q, k, v, spec(), scale=0.3)

    with jax.set_mesh(make_mesh(sizes)):
        program = str(jax.make_jaxpr(function)(q, k, v))
    assert ("_over_blocks" in program) != split


def test_platform_is_that_of_the_mesh_not_of_the_process():
    assert platform() == jax.default_backend() == "cpu"
    device = type(make_mesh({}).abstract_mesh.abstract_device)(device_kind="TPU v5p", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"
