"""The count of operations is twice the numbers in the matrices that each token passes, and attention over keys seen."""

import math

import pytest

from t5x_like.core import tree
from t5x_like.models import flops
from t5x_like.models.flops import keys_seen
from tests.models import cases


@pytest.mark.parametrize("case", ["llama_grouped_tied", "gpt2", "t5", "t5_gated"])
def test_products_with_weights_are_two_operations_for_each_number_and_token(case):
    model, length, source = cases.model(case), 12, 10
    total = 0
    for path, spec in tree.leaves(model.specs()):
        if "layers" not in spec.axes or len(spec.shape) < 3 or path.endswith("_bias"):
            continue
        of_source = path.startswith("encoder/") or path.endswith(("cross/k", "cross/v"))
        total += 2 * math.prod(spec.shape) * (source if of_source else length)
    counted = model.flops_per_token(length, source if model.config.encoder else 0)
    assert counted.weights * length == pytest.approx(total, rel=1e-12)
    assert counted.head == 2 * model.config.width * model.config.vocab_size
    assert counted.train == 3 * (counted.weights + counted.attention + counted.head)


def test_attention_counts_the_keys_that_are_seen():
    decoder = cases.model("llama").flops_per_token(8)
    assert decoder.attention == 2 * 4 * 4 * 8 * 4.5  # layers, operations, heads, head size, keys of a causal row
    both = cases.model("t5").flops_per_token(8, 10)
    own, cross, encoder = 4.5, 10, 10 * 10 / 8
    assert both.attention == pytest.approx(2 * 4 * 4 * 8 * (own + cross + encoder))
    assert [keys_seen(6, 0, causal=False), keys_seen(6, 1, causal=False)] == [6, 1]


def test_full_attention_counts_every_key_of_a_row_for_every_token():
    decoder = cases.model("llama").flops_per_token(8)
    assert decoder.full_attention == 2 * 4 * 4 * 8 * 8 > decoder.attention
    assert decoder.unmasked.train - decoder.train == 3 * (decoder.full_attention - decoder.attention)
    both = cases.model("t5").flops_per_token(8, 10)
    assert both.full_attention == pytest.approx(2 * 4 * 4 * 8 * (8 + 10 + 10 * 10 / 8))


def test_a_decoded_token_sees_the_whole_cache_and_passes_the_decoder_alone():
    model = cases.model("llama")
    row = model.flops_per_token(8)
    assert flops.of_new_token(model.config, length=8) == row.weights + row.full_attention + row.head
    both = cases.model("t5")
    again = flops.of_new_token(both.config, length=8, source_length=10)
    assert 0 < again < both.flops_per_token(8, 10).unmasked.forward  # no encoder, no keys of the source anew
