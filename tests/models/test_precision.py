"""What float32 compute asks of accelerators, read off the programs that are lowered for them on a CPU."""

import re

import jax
import pytest

from t5x_like.core.dtypes import DtypePolicy
from t5x_like.layers.scoring.head import logits
from t5x_like.layers.scoring.token_scores import token_scores
from t5x_like.models.model import Model
from t5x_like.parallel.rules import rules
from tests.models import cases


def products(platform, compute):
    """The text of each product of a forward and backward pass and of logits."""
    model = Model(cases.config("llama"), rules(), DtypePolicy("float32", compute))
    params = jax.eval_shape(model.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 8), "int32")

    def loss(params, ids):
        hidden, head = model.score_input(params, model.apply(params, {"inputs": ids}))
        scores = token_scores(hidden, head, ids, want=("logp", "logz"))
        return scores.logp.sum() + scores.logz.sum() + logits(hidden, head).max()

    device = type(jax.sharding.Mesh(jax.devices()[:1], "x").abstract_mesh.abstract_device)
    device = device(device_kind="a device that is not here", num_cores=1, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        text = jax.jit(jax.grad(loss)).trace(params, ids).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo\.dot_general.*", text)
    assert len(found) > 20
    return found


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_float32_compute_means_float32_products(platform):
    # Not one is left to round its operands to bfloat16 (TPU) or TF32 (GPU), in the backward pass neither.
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products(platform, "float32"))
    rounded = [product for product in products(platform, "bfloat16") if "HIGHEST" in product]
    assert all("bf16" in product for product in rounded)  # rotations by a permutation


def test_on_a_cpu_nothing_is_asked():
    assert not any("HIGHEST" in product for product in products("cpu", "float32"))
