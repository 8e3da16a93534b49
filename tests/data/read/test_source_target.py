"""Packed sources and targets: each example whole, once, in one segment of both rows. Against plain Python."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data.read.source_target import best_fit_of_two
from tests.data import corpus

SOURCE, TARGET = 24, 16
EXAMPLES = [("a" * (1 + 5 * i % 17), "\u00e9b" * (1 + i % 4)) for i in range(30)]
EXAMPLES += [("", "no source"), ("x" * 40, "long source"), ("short", "y" * 40)]


def write(path, examples):
    path.write_text("".join(json.dumps({"q": source, "a": target}) + "\n" for source, target in examples))
    return f"jsonl:{path}"


def config(source, **overrides):
    fields = {"inputs": "q", "targets": "a"}
    given = {
        "features": "source_target",
        "packing": "examples",
        "encoder_length": SOURCE,
        "length": TARGET,
        "truncate": corpus.END,
    }
    return corpus.config(source=source, fields=fields, **given | overrides)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("source_target")
    return write(root / "examples.jsonl", EXAMPLES), root / "cache"


@pytest.fixture(scope="module")
def data(world):
    return corpus.opened(config(world[0], batch_size=3), world[1])


def epoch(data):
    """All rows of the first epoch."""
    rows = data.describe()["components"]["train"]["rows"]
    batches = [data.rows(step, np.arange(data.batch_size)) for step in range(-(-rows // data.batch_size))]
    return {name: np.concatenate([batch[name] for batch in batches])[:rows] for name in batches[0]}


def examples_of(batch, row):
    """[(source, decoder inputs, targets)] of the segments of a row, as the ids that one attends to."""
    count = int(batch["segment_ids"][row].max())
    assert count == batch["encoder_segment_ids"][row].max()
    found = []
    for segment in range(1, count + 1):
        source = batch["encoder_segment_ids"][row] == segment
        target = batch["segment_ids"][row] == segment
        assert batch["encoder_positions"][row][source].tolist() == list(range(source.sum()))
        assert batch["positions"][row][target].tolist() == list(range(target.sum()))
        parts = (batch["encoder_inputs"][row][source], batch["inputs"][row][target], batch["targets"][row][target])
        found.append(tuple(part.tolist() for part in parts))
    return found


def expected(data, source, target):
    source = data.vocabulary.encode(source, eos=True)[:SOURCE]
    target = data.vocabulary.encode(target, eos=True)[:TARGET]
    return source, [0, *target[:-1]], target


@pytest.mark.parametrize("packing", ["examples", "single"])
def test_each_example_is_one_segment_of_both_rows_exactly_once(world, packing):
    data = corpus.opened(config(world[0], packing=packing), world[1])
    batch = epoch(data)
    found = [example for row in range(len(batch["inputs"])) for example in examples_of(batch, row)]
    assert sorted(found) == sorted(expected(data, *example) for example in EXAMPLES)
    assert (len(batch["inputs"]) == len(EXAMPLES)) == (packing == "single")


def test_rows_are_well_filled(data):
    batch = epoch(data)
    assert max((batch["segment_ids"] > 0).mean(), (batch["encoder_segment_ids"] > 0).mean()) > 0.75


def test_all_target_tokens_are_trained_and_stand_for_the_bytes_of_the_target(data):
    batch = epoch(data)
    assert np.array_equal(batch["loss_weights"] > 0, batch["segment_ids"] > 0)
    assert data.vocabulary.eos_id in batch["targets"][batch["loss_weights"] > 0]
    assert batch["target_bytes"].sum() == sum(min(len(target.encode()), TARGET) for _, target in EXAMPLES)


def test_what_does_not_fit_is_counted(data):
    assert data.describe()["components"]["train"]["truncated"] == 2


def test_documents_of_a_batch_are_the_examples_in_it(data):
    batch, places = data.rows(5, np.arange(3)), data.documents(5)
    lines = [json.dumps({"q": source, "a": target}) + "\n" for source, target in EXAMPLES]
    offsets = np.cumsum([0, *map(len, lines)]).tolist()
    for place in places:
        example = EXAMPLES[offsets.index(place.offset)]
        number = [other.column for other in places if other.row == place.row].index(place.column)
        assert examples_of(batch, place.row)[number] == expected(data, *example)
        assert batch["segment_ids"][place.row, place.column] == number + 1
    assert {place.row for place in places} == {0, 1, 2}


def test_held_out_examples_are_each_read_once_and_rows_behind_them_are_empty(world, tmp_path):
    held_out = write(tmp_path / "held.jsonl", EXAMPLES[:10])
    data = corpus.opened(config(world[0], validation=held_out), tmp_path / "cache")
    batches = data.evaluation("validation")
    read = [batches[index] for index in range(len(batches))]
    found = [example for batch in read for row in range(4) for example in examples_of(batch, row)]
    assert sorted(found) == sorted(expected(data, *example) for example in EXAMPLES[:10])
    empty = read[-1]["segment_ids"].max(axis=1) == 0
    assert all(not array[empty].any() for array in read[-1].values())


def test_the_decoder_begins_with_the_token_that_the_config_names(world):
    for name, token in (("pad", 0), ("eos", 1), ("7", 7)):
        data = corpus.opened(config(world[0], start_token=name), world[1])
        batch = data.rows(0, np.arange(4))
        first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        assert first.any() and set(batch["inputs"][first].tolist()) == {token}
    with pytest.raises(UsageError, match="start_token='bos' is no token of the bytes tokenizer"):
        corpus.opened(config(world[0], start_token="bos"), world[1])


def test_plain_documents_are_no_examples(tmp_path):
    text = corpus.write_jsonl(tmp_path / "text.jsonl", corpus.paragraphs(3))
    given = {"features": "source_target", "packing": "examples", "encoder_length": 8}
    with pytest.raises(UsageError, match=r"needs examples.*set config\.data\.fields\.inputs"):
        corpus.opened(corpus.config(source=text, **given), tmp_path / "cache")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=60))
def test_two_widths_are_packed_as_plain_python_packs_them(lengths):
    widths = (9, 6)
    rooms, held = [], []
    for example, (length, other) in enumerate(lengths):
        fitting = [(a, b, -used, row) for row, (a, b, used) in enumerate(rooms) if a >= length and b >= other]
        if fitting:
            a, b, _, row = min(fitting)
        else:
            (a, b), row = widths, len(rooms)
            rooms.append(None)
            held.append([])
        rooms[row] = (a - length, b - other, example)
        held[row].append(example)
    order, edges = best_fit_of_two(np.array(lengths).T, widths)
    assert [order[a:b].tolist() for a, b in zip(edges, edges[1:], strict=False)] == held
