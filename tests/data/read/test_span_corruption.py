"""Span corruption beside the published algorithm, derived here once more in plain Python.

The package `t5` is not installed and `seqio.preprocessors` has no span corruption, so its formulas
(text-to-text-transfer-transformer, t5/data/preprocessors.py: random_spans_helper, random_spans_noise_mask,
noise_span_to_unique_sentinel) stand here word by word, with t5's own test values and the example of the paper.
"""

import collections
import pathlib

import numpy as np
import pytest

from t5x_like.core.errors import UsageError
from t5x_like.data.read import span_corruption as spans
from t5x_like.data.read.loader import open_data
from tests.data import corpus

GOLDEN = pathlib.Path(__file__).parent / "golden_spans.txt"
SOURCE, TARGET = 40, 10


def random_spans_helper(inputs_length, density, mean):
    """(raw tokens, target tokens), as t5 finds them."""

    def lengths(tokens):
        noise = int(round(tokens * density))
        found = int(round(noise / mean))
        return tokens - noise + found + 1, noise + found + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    inputs, targets = lengths(tokens)
    if density == 0.5 and targets > inputs:
        tokens, targets = tokens - 1, targets - 1
    return tokens, targets


def unique_sentinels(tokens, mask, size):
    """noise_span_to_unique_sentinel, token by token."""
    result, sentinel, before = [], size, False
    for token, noise in zip(tokens, mask, strict=True):
        if noise and not before:
            sentinel -= 1
            result.append(sentinel)
        elif not noise:
            result.append(token)
        before = noise
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("spans")
    text = corpus.write_jsonl(root / "text.jsonl", corpus.paragraphs(12))
    given = {"features": "span_corruption", "encoder_length": SOURCE, "length": TARGET, "extra_ids": 20}
    return corpus.config(source=text, validation="0.2", **given), root / "cache"


@pytest.fixture(scope="module")
def data(world):
    return corpus.opened(*world, seed=5)


def restored(data, batch, row):
    """The text of a row: each sentinel of the source replaced by what stands behind it in the target."""
    first = data.vocabulary.size - data.vocabulary.extra_ids
    held = collections.defaultdict(list)
    for token in batch["targets"][row][batch["segment_ids"][row] > 0][:-1].tolist():
        if token >= first:
            sentinel = token
        else:
            held[sentinel].append(token)
    source = batch["encoder_inputs"][row][batch["encoder_segment_ids"][row] > 0][:-1].tolist()
    return [part for token in source for part in (held[token] if token >= first else [token])]


def test_lengths_are_those_of_t5s_helper():
    assert [spans.chunk_lengths(64, 0.2, mean) for mean in (2.0, 1.0)] == [(70, 22), (63, 27)]  # t5's own test
    for length in (37, 114, 128, 512, 1024):  # where t5's helper counts a span at all; its mask has always one
        for density, mean in ((0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.3, 1.0)):
            assert spans.chunk_lengths(length, density, mean) == random_spans_helper(length, density, mean)


@pytest.mark.parametrize(
    ("length", "density", "mean"), [(568, 0.15, 3.0), (32, 0.25, 2.0), (2, 0.15, 3.0), (9, 0.9, 1.0)]
)
def test_each_mask_has_exactly_t5s_noise_tokens_and_spans(length, density, mean):
    mask = spans.noise_mask(length, density, mean, np.arange(50, dtype=np.uint64))
    noise = min(max(round(length * density), 1), length - 1)
    assert mask.sum(axis=1).tolist() == [noise] * 50
    begins = mask & ~np.pad(mask[:, :-1], ((0, 0), (1, 0)))
    assert begins.sum(axis=1).tolist() == [min(max(round(noise / mean), 1), length - noise)] * 50
    assert not mask[:, 0].any() and mask[:, -1].all()  # spans alternate, the first is text and the last is noise


def test_all_masks_are_equally_likely():
    mask = spans.noise_mask(9, 1 / 3, 1.5, np.arange(20_000, dtype=np.uint64))  # 3 noise tokens in 2 spans
    counts = collections.Counter(map(bytes, mask))
    ways = 2 * 5  # to divide 3 noise tokens in two, and 6 others
    assert len(counts) == ways
    chi_squared = sum((count - 20_000 / ways) ** 2 / (20_000 / ways) for count in counts.values())
    assert chi_squared < 27.9  # 0.1% of 9 degrees of freedom


def test_sentinels_are_t5s(data):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 200, (20, 30))
    mask = spans.noise_mask(30, 0.3, 2.0, np.arange(20, dtype=np.uint64))
    for chosen in (mask, ~mask):
        found, _ = spans.with_sentinels(tokens, tokens, chosen, 999)
        assert found.tolist() == [unique_sentinels(*row, 1000) for row in zip(tokens, chosen, strict=True)]


def test_the_example_of_the_paper():
    words = "Thank you for inviting me to your party last week .".split()
    mask = np.array([[word in ("for", "inviting", "last") for word in words]])
    tokens = np.arange(len(words))[None]
    names = {99: "<X>", 98: "<Y>", 97: "<Z>"} | dict(enumerate(words))
    source, target = (spans.with_sentinels(tokens, tokens, noise, 99)[0][0].tolist() for noise in (mask, ~mask))
    assert [names[token] for token in source] == "Thank you <X> me to your party <Y> week .".split()
    assert [names[token] for token in target] == "<X> for inviting <Y> last <Z>".split()


def test_putting_the_spans_back_restores_the_text(data):
    """Of one epoch, all of the text: the chunks in order are the documents, each with its end token."""
    component = data.describe()["components"]["train"]
    chunk, _ = random_spans_helper(SOURCE, 0.15, 3.0)
    stream = [token for text in corpus.paragraphs(12) for token in data.vocabulary.encode(text, eos=True)]
    stream = stream[: component["tokens"]]
    wanted = sorted(stream[begin : begin + chunk] for begin in range(0, len(stream), chunk))
    examples = range(component["rows"])
    found = [restored(data, data.rows(example // 4, np.array([example % 4])), 0) for example in examples]
    assert sorted(found) == wanted and len(wanted[-1]) > 1


def test_rows_have_exactly_the_widths_of_the_config(data):
    batch = data.rows(0, np.arange(4))
    whole = [row for row in range(4) if len(restored(data, batch, row)) == random_spans_helper(SOURCE, 0.15, 3.0)[0]]
    assert whole
    for row in whole:
        assert batch["encoder_segment_ids"][row].tolist() == [1] * SOURCE
        assert batch["segment_ids"][row].tolist() == [1] * TARGET
        assert batch["encoder_inputs"][row, -1] == batch["targets"][row, -1] == data.vocabulary.eos_id
        assert batch["targets"][row, 0] == data.vocabulary.size - 1
        assert batch["inputs"][row].tolist() == [0, *batch["targets"][row, :-1].tolist()]


def test_target_bytes_are_those_of_the_noise(data):
    batch = data.rows(0, np.arange(4))
    text = (batch["targets"] >= 3) & (batch["targets"] < 259)  # the bytes tokenizer: one byte each
    assert text.any() and np.array_equal(batch["target_bytes"], text.astype(np.int32))


def test_every_epoch_sees_other_spans_of_the_same_text(data):
    rows = data.describe()["components"]["train"]["rows"]
    epochs = []
    for first in (0, rows):
        batches = [data.rows(example // 4, np.array([example % 4])) for example in range(first, first + rows)]
        epochs.append(sorted((restored(data, batch, 0), batch["targets"][0].tolist()) for batch in batches))
    assert [text for text, _ in epochs[0]] == [text for text, _ in epochs[1]]
    assert sum(one != other for (_, one), (_, other) in zip(*epochs, strict=True)) >= rows - 2


def test_spans_depend_on_seed_and_row_and_held_out_ones_on_the_row_alone(world, data):
    other = open_data(world[0], cache_dir=str(world[1]), seed=6)
    held_out, again = (opened.evaluation("validation") for opened in (data, other))
    assert len(held_out) and all(
        np.array_equal(held_out[index][name], again[index][name])
        for index in range(len(held_out))
        for name in held_out[index]
    )
    assert not np.array_equal(data.rows(0, np.arange(4))["targets"], other.rows(0, np.arange(4))["targets"])
    assert np.array_equal(data.rows(3, np.array([2]))["targets"][0], data.rows(3, np.arange(4))["targets"][2])


def test_the_spans_are_the_frozen_ones(data):
    """Spans are part of a run's identity: a change of this file is a change that breaks every resume."""
    lines = []
    for step in (0, 1, 10**6):
        batch = data.rows(step, np.arange(4))
        lines += [f"{step} {row} " + " ".join(map(str, batch["targets"][row].tolist())) for row in range(4)]
    assert lines == GOLDEN.read_text().splitlines()


def test_documents_of_a_batch_name_the_text_of_its_chunks(data):
    batch = data.rows(1, np.arange(4))
    for place in data.documents(1):
        text = corpus.paragraphs(12)
        chunk = restored(data, batch, place.row)[place.column :]
        chunk = chunk[: chunk.index(1)] if 1 in chunk else chunk
        assert any(data.vocabulary.decode(chunk).strip("\ufffd") in paragraph for paragraph in text)


def test_what_cannot_be_corrupted_is_said_in_one_line(world):
    source = world[0].source
    given = {"source": source, "features": "span_corruption", "encoder_length": SOURCE, "length": TARGET}
    with pytest.raises(UsageError, match=r"needs 2 sentinels, the tokenizer has 0; set config\.data\.extra_ids=100"):
        corpus.opened(corpus.config(**given), world[1])
    for wrong, message in (
        ({"length": 8}, r"length=8 is too short for the 10 target tokens.*set config\.data\.length=10"),
        ({"packing": "examples"}, r"packing='examples' does not go with features='span_corruption'"),
        ({"span_corruption": {"noise_density": 0.0}}, "noise_density=0.0 should lie between 0 and 1"),
        ({"encoder_length": 0}, "encoder_length=0 should be at least 1"),
        ({"attend_across_documents": True}, "attend_across_documents=True has no effect"),
    ):
        with pytest.raises(UsageError, match=message):
            corpus.opened(corpus.config(**given | {"extra_ids": 20} | wrong), world[1])
