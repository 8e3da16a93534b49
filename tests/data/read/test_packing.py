"""Rows hold every token once, know their documents, and carry loss where they should. Against plain Python."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from t5x_like.data import token_set, token_shards
from t5x_like.data.config import TruncateConfig
from t5x_like.data.open_files import open_files
from t5x_like.data.read import causal, packing

END = TruncateConfig(rule="end", inputs="left", min_targets=0)
LENGTHS = (3, 1, 40, 7, 2, 2, 19, 5, 11, 1, 1, 30)


def written(folder, lengths, *, inputs=None, shards=3):
    """A token set whose tokens are 1, 2, 3, ... and stand for token % 7 bytes (some of them for more than 255)."""
    ids = np.arange(1, sum(lengths) + 1)
    counts = np.where(ids % 10 == 0, 250 + ids, ids % 7)
    inputs = np.zeros(len(lengths), int) if inputs is None else np.array(inputs)
    edges = np.linspace(0, len(lengths), shards + 1).astype(int)
    facts, first = [], 0
    for shard, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        mine = np.array(lengths[low:high])
        part = slice(first, first + mine.sum())
        first += int(mine.sum())
        documents = np.arange(low, high)
        batch = token_shards.Encoded(
            ids[part], counts[part], mine, inputs[low:high], documents % 2, 100 * documents, skipped=0
        )
        facts.append(token_shards.write_shard(folder, shard, [batch], "<u2"))
    token_shards.write_index(folder, fingerprint="x", kind="<u2", unit="byte", shards=facts)
    return token_set.TokenSet(folder, verify=True, files=open_files()), ids, counts


def every(packed):
    return packed.read(np.arange(packed.size.rows))


@pytest.mark.parametrize("length", [1, 4, 16, 60, 121, 500])
def test_each_token_but_the_first_is_a_target_exactly_once(tmp_path, length):
    tokens, ids, _ = written(tmp_path, LENGTHS)
    batch = causal.batch(
        every(packing.Concatenated(tokens, length=length, stride=length)), attend_across_documents=True
    )
    assert batch["targets"][batch["loss_weights"] > 0].tolist() == ids[1:].tolist()
    assert batch["inputs"][batch["loss_weights"] > 0].tolist() == ids[:-1].tolist()


@pytest.mark.parametrize(("length", "stride"), [(16, 4), (16, 15), (16, 1), (200, 7)])
def test_overlapping_rows_predict_each_token_once_with_more_before_it(tmp_path, length, stride):
    tokens, ids, _ = written(tmp_path, LENGTHS)
    batch = causal.batch(
        every(packing.Concatenated(tokens, length=length, stride=stride)), attend_across_documents=True
    )
    trained = batch["loss_weights"] > 0
    assert batch["targets"][trained].tolist() == ids[1:].tolist()
    later = np.flatnonzero(np.arange(len(ids) - 1) >= length)
    columns = np.nonzero(trained)[1]
    assert len(ids) - 1 <= length or columns[later].min() >= length - stride


def test_bytes_are_counted_with_their_token_and_large_counts_are_kept(tmp_path):
    tokens, ids, counts = written(tmp_path, LENGTHS)
    batch = causal.batch(every(packing.Concatenated(tokens, length=16, stride=16)), attend_across_documents=False)
    assert counts.max() > 255
    by_token = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    trained = batch["loss_weights"] > 0
    assert batch["target_bytes"][trained].tolist() == [by_token[t] for t in batch["targets"][trained].tolist()]
    assert batch["target_bytes"].sum() == counts[1:].sum()  # none is counted where there is no loss


def test_segments_and_positions_begin_anew_with_each_document(tmp_path):
    tokens, ids, _ = written(tmp_path, LENGTHS)
    batch = causal.batch(every(packing.Concatenated(tokens, length=16, stride=16)), attend_across_documents=False)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for row in range(len(batch["inputs"])):
        mine = [document[token - 1] if token else None for token in batch["inputs"][row]]
        segment, position = 0, 0
        for column, number in enumerate(mine):
            new = column == 0 or number != mine[column - 1]
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
            padding = number is None or batch["inputs"][row, column] == 0
            assert batch["segment_ids"][row, column] == (0 if padding else segment)
            assert batch["positions"][row, column] == (0 if padding else position)


def test_with_attention_across_documents_there_are_no_segments(tmp_path):
    tokens, _, _ = written(tmp_path, LENGTHS)
    rows = every(packing.Concatenated(tokens, length=16, stride=16))
    apart, together = (causal.batch(rows, attend_across_documents=value) for value in (False, True))
    assert set(apart) - set(together) == {"segment_ids"} and (together["positions"] == np.arange(16)).all()
    assert not np.array_equal(apart["positions"], together["positions"])
    assert {name: array.dtype for name, array in apart.items()} == {
        name: np.dtype("float32" if name == "loss_weights" else "int32") for name in apart
    }


@pytest.mark.parametrize("kind", ["concatenate", "examples"])
def test_inputs_of_an_example_carry_no_loss(tmp_path, kind):
    inputs = [min(2, length - 1) for length in LENGTHS]
    tokens, ids, _ = written(tmp_path, LENGTHS, inputs=inputs)
    batch = causal.batch(
        every(packing.pack(kind, tokens, length=40, stride=40, truncate=END, bos=None)), attend_across_documents=False
    )
    within = np.concatenate([np.arange(length) for length in LENGTHS])
    silent = np.concatenate([np.arange(n) < max(i, kind == "examples") for n, i in zip(LENGTHS, inputs, strict=True)])
    wanted = [int(t) for t, skip in zip(ids, silent, strict=True) if not skip and (kind == "examples" or t > 1)]
    assert sorted(batch["targets"][batch["loss_weights"] > 0].tolist()) == wanted and within.max() == 39


def test_the_documents_of_a_row_are_those_its_tokens_come_from(tmp_path):
    tokens, ids, _ = written(tmp_path, LENGTHS)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    within = np.concatenate([np.arange(length) for length in LENGTHS])
    for packed in (
        packing.Concatenated(tokens, length=16, stride=16),
        packing.Concatenated(tokens, length=16, stride=5),
        packing.BestFit(tokens, length=16, truncate=END, bos=None),
    ):
        rows = every(packed)
        for row in range(packed.size.rows):
            read = rows.tokens[row, : rows.valid[row]] - 1
            mine = document[read]
            begins = [column for column, number in enumerate(mine) if column == 0 or number != mine[column - 1]]
            assert packed.documents(row) == [(mine[column], column, within[read[column]]) for column in begins]


def test_the_text_before_a_token_is_counted_over_shards_and_large_counts(tmp_path, monkeypatch):
    tokens, _, counts = written(tmp_path, LENGTHS)
    monkeypatch.setattr(token_set, "_READ_AT_ONCE", 4)
    for document, (end, length) in enumerate(zip(np.cumsum(LENGTHS), LENGTHS, strict=True)):
        for token in range(length):
            assert tokens.text_bytes_before(document, token) == counts[end - length :][:token].sum()


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_places_each_example_once_and_no_row_overflows(lengths):
    order, edges = packing.best_fit(np.array(lengths), 50)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    fill = [sum(lengths[example] for example in order[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert max(fill) <= 50 and min(fill) > 0
    # Two rows that fit into one would have been one: at most one row is half empty.
    assert sum(2 * used <= 50 for used in fill) <= 1


def test_whole_examples_fill_rows_and_long_ones_lose_their_end(tmp_path):
    tokens, ids, _ = written(tmp_path, LENGTHS)
    packed = packing.BestFit(tokens, length=20, truncate=END, bos=None)
    rows = every(packed)
    assert packed.cut.examples == sum(length > 21 for length in LENGTHS) > 0
    starts = np.cumsum([0, *LENGTHS[:-1]])
    kept = sorted(t for start, n in zip(starts, LENGTHS, strict=True) for t in ids[start : start + min(n, 21)].tolist())
    assert sorted(rows.tokens[rows.tokens > 0].tolist()) == kept
    assert packed.size.tokens == len(kept) and packed.size.rows < len(LENGTHS)


def test_a_document_is_found_again_in_its_file(tmp_path):
    tokens, _, _ = written(tmp_path, LENGTHS)
    assert [tokens.place(document) for document in range(len(LENGTHS))] == [
        (d % 2, 100 * d) for d in range(len(LENGTHS))
    ]


def test_rows_are_read_the_same_from_several_threads(tmp_path):
    import concurrent.futures

    tokens, _, _ = written(tmp_path, LENGTHS * 5)
    packed = packing.Concatenated(tokens, length=16, stride=16)
    expected = every(packed).tokens
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: every(packed).tokens, range(20)):
            assert np.array_equal(result, expected)
