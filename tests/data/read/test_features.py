"""What all kinds of features have in common."""

import json

import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data.read import features
from tests.data import corpus
from tests.data.read import test_source_target

CASES = {
    "causal": {},
    "causal across documents": {"attend_across_documents": True},
    "causal prefix": {"packing": "examples", "length": 32, "prefix": True},
    "source_target": {"packing": "examples", "encoder_length": 24, "length": 16},
    "pairs": {"packing": "single", "length": 20},
    "pairs of an encoder-decoder": {"packing": "single", "length": 20, "encoder_length": 24},
    "pair_texts of an encoder-decoder": {"packing": "single", "length": 20, "encoder_length": 24},
    "labels": {"packing": "single", "length": 20},
    "span_corruption": {"encoder_length": 24, "length": 9, "extra_ids": 9},
}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
FIELDS = {
    "causal prefix": {"inputs": "q", "targets": "a"},
    "source_target": {"inputs": "q", "targets": "a"},
    "pairs": PAIR,
    "pairs of an encoder-decoder": PAIR,
    "pair_texts of an encoder-decoder": PAIR,
    "labels": {"text": "a", "label": "c"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    records = [
        {"q": source, "a": target, "b": target[::2], "c": number % 3}
        for number, (source, target) in enumerate(test_source_target.EXAMPLES)
    ]
    (root / "examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"jsonl:{root}/examples.jsonl"
    given = CASES[request.param] | {"features": request.param.split()[0]}
    given["fields"] = FIELDS.get(request.param, {"text": "a"})
    chosen = corpus.config(source=source, batch_size=3, validation=source, **given)
    return chosen, corpus.opened(chosen, root / "cache")


def test_a_batch_has_the_arrays_that_were_declared(case):
    chosen, data = case
    declared = features.arrays(chosen)
    for batch in (data.rows(0, np.arange(3)), data.evaluation("validation")[0]):
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            name: (array.shape, array.dtype) for name, array in declared.items()
        }
    assert all(len(array.axes) == len(array.shape) and array.axes[0] == "batch" for array in declared.values())


def test_rows_are_the_same_however_they_are_asked_for(case):
    _, data = case
    for step in (0, 7):
        whole, rows = data.rows(step, np.arange(3)), np.array([2, 0])
        part = data.rows(step, rows)
        assert all(np.array_equal(part[name], whole[name][rows]) for name in whole)


def test_all_rows_of_a_batch_have_documents_and_all_their_tokens_count(case):
    chosen, data = case
    assert {place.row for place in data.documents(0)} == {0, 1, 2}
    texts = 2 if chosen.features.startswith("pair") else 1
    assert data.tokens_per_step == 3 * (texts * chosen.length + chosen.encoder_length)


def test_features_and_what_they_are_made_of_are_part_of_the_fingerprint(tmp_path):
    text = corpus.write_jsonl(tmp_path / "text.jsonl", corpus.paragraphs(9))
    given = {"source": text, "features": "span_corruption", "encoder_length": 24, "length": 9, "extra_ids": 9}
    one = corpus.opened(corpus.config(**given), tmp_path / "cache").fingerprint
    noise = {"noise_density": 0.1}
    other = corpus.opened(corpus.config(**given, span_corruption=noise), tmp_path / "cache").fingerprint
    assert one != other
    causal = corpus.opened(corpus.config(source=text), tmp_path / "cache").fingerprint
    assert causal not in (one, other)


def test_unknown_features_are_an_error_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"features='span_corupt' is unknown; did you mean 'span_corruption'\?"):
        features.arrays(corpus.config(features="span_corupt"))
    with pytest.raises(UsageError, match="encoder_length=9 has no effect with features='causal'; leave it at 0"):
        features.arrays(corpus.config(encoder_length=9))


def test_a_prefix_is_the_inputs_of_each_example(tmp_path):
    (tmp_path / "examples.jsonl").write_text('{"q": "ab", "a": "xyz"}\n{"q": "c", "a": "uv"}\n')
    source = f"jsonl:{tmp_path}/examples.jsonl"
    fields = {"inputs": "q", "targets": "a"}
    chosen = corpus.config(source=source, fields=fields, packing="examples", prefix=True, length=12, batch_size=1)
    batch = corpus.opened(chosen, tmp_path / "cache").rows(0, np.arange(1))
    seen = {
        bytes(np.asarray(batch["inputs"][0][(batch["segment_ids"][0] == n) & (batch["prefix"][0] == 1)] - 3, np.uint8))
        for n in (1, 2)
    }
    assert seen == {b"ab", b"c"}
    assert not (batch["prefix"][0] & (batch["segment_ids"][0] == 0)).any()


def test_a_prefix_without_whole_examples_is_refused():
    with pytest.raises(UsageError, match="config.data.prefix=True needs examples with inputs"):
        features.arrays(corpus.config(source="text:x", prefix=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"span_corruption": {"noise_density": 0.3}}, "span_corruption.noise_density=0.3 has no effect with features="),
        ({"span_corruption": {"mean_span_length": 2.0}}, "span_corruption.mean_span_length=2.0 .*; leave it at 3.0"),
        ({"start_token": "bos"}, "start_token=bos has no effect with features='causal'; leave it at pad"),
        ({"features": "pairs", "packing": "single", "validation_stride": 4}, "validation_stride=4 has no effect"),
        ({"packing": "concat"}, "packing='concat' is unknown; did you mean 'concatenate'"),
        ({"features": "pairs"}, "packing='concatenate' does not go with features='pairs'"),
        ({"validation_stride": 17}, "validation_stride=17 should lie between 0 and length=16"),
    ],
)
def test_a_field_that_changes_nothing_or_does_not_fit_is_one_line(given, message):
    with pytest.raises(UsageError, match=f"^config.data.{message}") as error:
        features.arrays(corpus.config(**given))
    assert "\n" not in str(error.value)
