"""A token cache that an early version wrote (revision 15f4900) is read by this one, to the same bits.

`tests/specimens/token_cache`: 12 examples, a BPE of 260 tokens. Its sources are not there, as on a training machine.
"""

import json
import pathlib

import numpy as np

from t5x_like.data.read.loader import open_data
from tests.data import corpus

SPECIMEN = pathlib.Path(__file__).parents[2] / "specimens" / "token_cache"
EXAMPLES = {"source": "jsonl:examples.jsonl", "fields": {"inputs": "q", "targets": "a"}, "tokenizer": "train:bpe:260"}


def test_an_early_cache_gives_the_batch_that_it_gave_then():
    expected = json.loads((SPECIMEN / "expected.json").read_text())
    chosen = corpus.config(**EXAMPLES, validation="0.25", packing="examples", length=48, batch_size=2, verify=True)
    data = open_data(chosen, cache_dir=str(SPECIMEN / "cache"), seed=expected["seed"])
    assert data.fingerprint == expected["fingerprint"]
    batch = data.rows(expected["step"], np.arange(2))
    assert {name: array.tolist() for name, array in batch.items()} == expected["batch"]
    data.close()


def test_an_early_cache_of_examples_can_be_read_by_an_encoder_decoder():
    given = {"features": "source_target", "packing": "examples", "encoder_length": 40, "length": 30, "batch_size": 2}
    chosen = corpus.config(**EXAMPLES, validation="0.25", **given)
    data = open_data(chosen, cache_dir=str(SPECIMEN / "cache"), seed=0)
    batch = data.rows(0, np.arange(2))
    segment = batch["encoder_inputs"][0][batch["encoder_segment_ids"][0] == 1]
    assert data.vocabulary.decode(segment).startswith("What is ")
    data.close()
