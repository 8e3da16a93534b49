"""A batch is a pure function of (config, seed, step): whoever reads it, in whatever order, split in whatever way."""

import pathlib
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from t5x_like.core import config as bridge
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.config import DataConfig
from t5x_like.data.read.loader import Prefetch, open_data
from tests.data import corpus

GOLDEN = pathlib.Path(__file__).parent / "golden_order.txt"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(config of a mixture of three sources, folder of its cache)"""
    root = tmp_path_factory.mktemp("loader")
    counts = {"large": 40, "middle": 15, "small": 9}
    listed = {name: corpus.write_jsonl(root / f"{name}.jsonl", corpus.paragraphs(n)) for name, n in counts.items()}
    mixture = {"sources": listed, "rates": {"large": 2.0, "middle": 1.0, "small": 1.5}, "counts": "tokens"}
    chosen = corpus.config(mixture=mixture, validation="0.1", batch_size=6)
    corpus.opened(chosen, root / "cache")
    return chosen, root / "cache"


@pytest.fixture(scope="module")
def data(world):
    return open_data(world[0], cache_dir=str(world[1]), seed=3)


def whole(data, step):
    return data.rows(step, np.arange(data.batch_size))


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_the_order_is_the_frozen_one(data):
    """Order is part of a run's identity: a change of this file is a change that breaks every resume."""
    lines = []
    for step in (0, 1, 1000, 10**9):
        batch = whole(data, step)
        places = {place.row: place for place in reversed(data.documents(step))}
        for row in range(data.batch_size):
            checksum = int((batch["inputs"][row].astype(np.int64) * np.arange(1, 17)).sum())
            place = places[row]
            lines.append(f"{step} {row} {place.component} epoch {place.epoch} offset {place.offset} sum {checksum}")
    assert lines == GOLDEN.read_text().splitlines()


def test_a_batch_is_the_same_however_it_is_divided_and_ordered(data):
    expected = {step: whole(data, step) for step in range(12)}

    @hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.tuples(st.integers(0, 11), st.permutations(range(6)), st.integers(0, 6)), max_size=6))
    def check(asked):
        for step, rows, cut in asked:
            for part in (rows[:cut], rows[cut:]):
                if part:
                    read = data.rows(step, np.array(part))
                    assert equal(read, {name: array[part] for name, array in expected[step].items()})

    check()


def test_another_process_with_another_history_reads_the_same(world, data):
    again = open_data(world[0], cache_dir=str(world[1]), seed=3)
    for step in (7, 2, 7, 10**6):
        assert equal(whole(again, step), whole(data, step))
    assert again.fingerprint == data.fingerprint


def test_another_seed_gives_another_order_of_the_same_rows(world, data):
    other = open_data(world[0], cache_dir=str(world[1]), seed=4)
    assert not equal(whole(other, 0), whole(data, 0)) and other.fingerprint != data.fingerprint


def rows_of(data, component, count):
    """(row number order, epoch) of the first `count` examples of a component, by the documents they hold."""
    found, step = [], 0
    while len(found) < count:
        batch = whole(data, step)
        for row in sorted({p.row for p in data.documents(step) if p.component == component}):
            found.append(batch["inputs"][row].tobytes() + batch["positions"][row].tobytes())
        step += 1
    return found[:count]


@pytest.mark.parametrize("component", ["middle", "small"])
def test_each_epoch_holds_every_row_once_in_another_order(data, component):
    rows = data.describe()["components"][component]["rows"]
    read = rows_of(data, component, 3 * rows)
    epochs = [read[start : start + rows] for start in range(0, 3 * rows, rows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2] and len(set(epochs[0])) > 0.7 * rows


def test_components_are_read_at_their_rates_at_every_step(data):
    counts = {"large": 0, "middle": 0, "small": 0}
    rates = {"large": 2 / 4.5, "middle": 1 / 4.5, "small": 1.5 / 4.5}
    for step in range(30):
        for component in {(p.row, p.component) for p in data.documents(step)}:
            counts[component[1]] += 1
        for name, rate in rates.items():
            assert abs(counts[name] - rate * (step + 1) * data.batch_size) < 1


def test_the_summary_counts_tokens_and_epochs_to_come(data):
    facts = data.describe(steps=300)
    assert facts["tokens_to_come"] == 300 * 6 * 16 and facts["fingerprint"] == data.fingerprint
    for component in facts["components"].values():
        assert component["epochs"] == pytest.approx(300 * 6 * component["share_of_rows"] / component["rows"])
    assert sum(component["share_of_rows"] for component in facts["components"].values()) == pytest.approx(1)


def test_documents_name_where_the_text_of_each_row_lies(world, data):
    batch = whole(data, 5)
    for place in data.documents(5):
        with open(place.file, "rb") as file:
            file.seek(place.offset)
            text = corpus.json.loads(file.readline())["text"]
        segment = batch["segment_ids"][place.row, place.column]
        mine = batch["inputs"][place.row][batch["segment_ids"][place.row] == segment]
        assert data.vocabulary.decode_bytes(mine[:8]) in text.encode() and place.unit == "byte"


@pytest.mark.parametrize("tokenizer", ["bytes", "train:bpe:300"])
def test_the_text_of_a_row_is_found_within_a_document_of_many_rows(tmp_path, tokenizer):
    texts = {"a.txt": " ".join(corpus.paragraphs(30)), "b.txt": "\n".join(corpus.paragraphs(8)[::-1])}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    chosen = corpus.config(source=f"text:{tmp_path}/*.txt", tokenizer=tokenizer, batch_size=16)
    data = corpus.opened(chosen, tmp_path / "cache")
    batch, places = whole(data, 1), data.documents(1)
    assert len({(place.file, place.text_byte) for place in places}) > 12
    for place in places:
        content = pathlib.Path(place.file).read_bytes()[place.offset + place.text_byte :]
        mine = batch["segment_ids"][place.row] == batch["segment_ids"][place.row, place.column]
        read = data.vocabulary.decode_bytes(batch["inputs"][place.row][mine])
        assert content.startswith(read) and (read or not content)


def test_held_out_batches_are_whole_padded_and_disjoint_from_training(world, data):
    sets = data.evaluation_batches()
    assert list(sets) == ["large", "middle", "small"]
    facts = data.describe()["validation"]
    for name, batches in sets.items():
        read = list(batches)
        assert len(read) == len(batches) and all(batch["inputs"].shape == (6, 16) for batch in read)
        assert sum(batch["loss_weights"].sum() for batch in read) == facts[name]["tokens"] - 1
        padding = read[-1]["loss_weights"].sum(axis=1) == 0
        assert (read[-1]["segment_ids"][padding] == 0).all() and (read[-1]["target_bytes"][padding] == 0).all()
        assert equal(batches.rows(0, np.array([4, 1])), {key: array[[4, 1]] for key, array in read[0].items()})
        with pytest.raises(IndexError):
            batches[len(batches)]
    assert any((batch["loss_weights"].sum(axis=1) == 0).any() for batches in sets.values() for batch in batches)


def test_a_source_of_which_nothing_is_held_out_is_not_evaluated_on(tmp_path):
    """Its last record is longer than the tenth that is cut off."""
    records = {"even": corpus.paragraphs(30), "uneven": [*corpus.paragraphs(3), " ".join(corpus.paragraphs(30))]}
    listed = {name: corpus.write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in records.items()}
    data = corpus.opened(corpus.config(mixture={"sources": listed}, validation="0.1"), tmp_path / "cache")
    assert list(data.evaluation_batches()) == ["even"]
    assert data.describe()["unevaluated"] == {"uneven": listed["uneven"]}
    alone = corpus.config(source=listed["uneven"], validation="0.1")
    with pytest.raises(UsageError, match="validation='0.1' holds out no text of any source"):
        corpus.opened(alone, tmp_path / "cache")


def test_fewer_held_out_batches_are_the_first(world, data):
    import dataclasses

    few = open_data(dataclasses.replace(world[0], validation_batches=2), cache_dir=str(world[1]), seed=3)
    chosen, every = few.evaluation("large"), data.evaluation("large")
    assert len(chosen) == 2 < len(every) and equal(chosen[1], every[1])
    with pytest.raises(UserError, match="did you mean 'large'"):
        few.evaluation("larg")


def test_closing_closes_the_files_of_a_source_of_rate_zero_too(tmp_path):
    counts = {"read": 9, "unread": 8}
    listed = {name: corpus.write_jsonl(tmp_path / f"{name}.jsonl", corpus.paragraphs(n)) for name, n in counts.items()}
    mixture = {"sources": listed, "rates": {"read": 1.0, "unread": 0.0}}
    data = corpus.opened(corpus.config(mixture=mixture, validation="0.5"), tmp_path / "cache")
    whole(data, 0)
    assert list(data.describe()["components"]) == ["read"] and len(corpus.open_below(tmp_path)) == 4
    data.close()
    assert not corpus.open_below(tmp_path)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetching_changes_no_result(data, ahead):
    prefetch = Prefetch(lambda step: whole(data, step), ahead=ahead)
    try:
        for step in (0, 1, 2, 9, 10, 3, 3, 4, 0):
            assert equal(prefetch(step), whole(data, step))
    finally:
        prefetch.close()


def test_prefetching_reads_ahead_in_one_other_thread_and_raises_where_it_belongs():
    read, threads = [], set()

    def reader(step):
        read.append(step)
        threads.add(threading.current_thread().name)
        if step == 2:
            raise UserError("shard 2 is broken")
        return step

    prefetch = Prefetch(reader, ahead=1)
    assert prefetch(0) == 0 and prefetch(1) == 1
    with pytest.raises(UserError, match="shard 2"):
        prefetch(2)
    assert prefetch(3) == 3
    prefetch.close()
    assert len(threads) == 1 and sorted(read[:4]) == [0, 1, 2, 3] and "Main" not in next(iter(threads))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"batch_size": 0}, "config.data.batch_size=0"),
        ({"length": 0}, "config.data.length=0"),
        ({"packing": "example"}, "did you mean 'examples'"),
        ({"validation_stride": 17}, "validation_stride=17"),
        ({"validation_batches": -1}, "config.data.validation_batches=-1 should be at least 0"),
        ({"prefetch": -1}, "config.data.prefetch=-1 should be at least 0"),
    ],
)
def test_a_wrong_shape_is_named(world, change, expected):
    section = bridge.to_dict(world[0]) | change
    with pytest.raises(UsageError, match=expected):
        open_data(bridge.build(DataConfig, section, path="config.data"), cache_dir=str(world[1]), seed=0)


def test_what_was_not_prepared_is_said(world, tmp_path):
    with pytest.raises(UserError, match="run `t5x_like prepare`"):
        open_data(world[0], cache_dir=str(tmp_path), seed=0)
