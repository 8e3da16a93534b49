"""Examples that are longer than their row keep something to train on, by a stated rule, and are counted."""

import json
import pathlib

import numpy as np
import pytest

from t5x_like.__main__ import main
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data.tokenizers import behind
from tests.data import corpus

STORIES = str(pathlib.Path(__file__).parents[1] / "stories260K")
LENGTH = 32
FIELDS = {"inputs": "q", "targets": "a"}
LONG = ("abcdefghijklmnopqrstuvwxyz0123456789ABCD", "yes")  # 40 letters


def write(path, examples, names="qa"):
    path.write_text("".join(json.dumps(dict(zip(names, example, strict=True))) + "\n" for example in examples))
    return f"jsonl:{path}"


def opened(tmp_path, examples, **overrides):
    given = {"fields": FIELDS, "packing": "examples", "length": LENGTH, "batch_size": 1} | overrides
    return corpus.opened(corpus.config(source=write(tmp_path / "a.jsonl", examples), **given), tmp_path / "cache")


def trained(data, batch):
    """The text of the tokens that carry loss."""
    return data.vocabulary.decode(batch["targets"][batch["loss_weights"] > 0].tolist())


def test_inputs_lose_their_begin_so_that_targets_have_room(tmp_path):
    data = opened(tmp_path, [LONG])
    batch = data.rows(0, np.arange(1))
    assert trained(data, batch) == "yes" and batch["loss_weights"].sum() == 4  # with EOS
    assert data.vocabulary.decode(batch["inputs"][0].tolist()) == (LONG[0] + "yes")[-LENGTH:]
    [facts] = data.describe()["components"].values()
    assert facts["cut"] == "1 examples do not fit a row: 1 lose tokens of their inputs, 0 of their targets"


def test_inputs_may_lose_their_end_instead(tmp_path):
    data = opened(tmp_path, [LONG], truncate={"inputs": "right"})
    batch = data.rows(0, np.arange(1))
    assert trained(data, batch) == "yes"
    assert data.vocabulary.decode(batch["inputs"][0].tolist()) == LONG[0][: LENGTH + 1 - 4] + "yes"


def test_targets_lose_their_end_beyond_the_minimum(tmp_path):
    both = (LONG[0], "z" * 40)
    for least, expected in ((0, 16), (5, 5), (32, 32)):
        data = opened(tmp_path, [both], truncate={"min_targets": least})
        batch = data.rows(0, np.arange(1))
        assert trained(data, batch) == "z" * expected and batch["loss_weights"].sum() == expected
        assert data.describe()["components"]["train"]["truncated"] == 1
    short = opened(tmp_path, [("ab", "z" * 40)])  # inputs that are short leave their room to the targets
    assert short.rows(0, np.arange(1))["loss_weights"].sum() == LENGTH + 1 - 2


@pytest.mark.parametrize("features", ["causal", "source_target"])
def test_the_token_that_begins_a_text_stays(tmp_path, features):
    more = {"features": "source_target", "encoder_length": 12} if features == "source_target" else {}
    data = opened(tmp_path, [LONG], tokenizer=STORIES, length=20, **more)
    batch, bos, eos = data.rows(0, np.arange(1)), data.vocabulary.bos_id, data.vocabulary.eos_id
    name, width = ("encoder_inputs", 12) if more else ("inputs", 20)
    read, source = batch[name][0].tolist(), data.vocabulary.encode(LONG[0])
    assert len(source) > 20 and read[0] == bos and trained(data, batch) == "yes"
    if more:
        assert read[1:] == [*source[-(width - 2) :], eos]
    else:
        ((target, _),) = behind.encode(data.vocabulary, [LONG[0]], ["yes"])
        assert read[1:] == [*source[-(width - len(target) - 1) :], *target]


def test_both_sides_of_a_pair_keep_the_same_end_of_the_prompt(tmp_path):
    source = write(tmp_path / "pairs.jsonl", [(LONG[0], "good", "bad")], "pcr")
    fields = {"prompt": "p", "chosen": "c", "rejected": "r"}
    chosen = corpus.config(source=source, features="pairs", packing="single", length=LENGTH, fields=fields)
    data = corpus.opened(chosen, tmp_path / "cache")
    batch, prompt = data.rows(0, np.arange(1)), LONG[0][-(LENGTH + 1 - 5) :]
    for side, answer in (("chosen", "good"), ("rejected", "bad")):
        read = {name: batch[f"{side}/{name}"] for name in ("inputs", "targets", "loss_weights")}
        assert trained(data, read) == answer
        assert data.vocabulary.decode(read["inputs"][0].tolist()) == prompt + answer


def test_examples_can_be_left_out_and_are_counted_by_source(tmp_path):
    examples = [("ab", "cd"), LONG, ("ef", "gh")]
    for features, packing in (("causal", "examples"), ("source_target", "single")):
        more = {"features": features, "encoder_length": LENGTH} if features == "source_target" else {}
        data = opened(tmp_path, examples, truncate={"rule": "drop"}, packing=packing, **more)
        facts = data.describe()["components"]["train"]
        assert (facts["dropped"], facts["documents"]) == (1, 3)
        assert facts["cut"] == "1 examples do not fit a row and are left out"
        rows = range(facts["rows"])
        texts = "".join(trained(data, data.rows(step, np.arange(1))) for step in rows)
        assert sorted(texts) == sorted("cdgh")
        assert {place.offset for step in rows for place in data.documents(step)} == {0, 85}


@pytest.mark.parametrize("rule", ["drop", "end"])
def test_no_token_to_train_on_is_an_error(tmp_path, rule):
    with pytest.raises(UserError, match=r"a\.jsonl: no token to train on in its rows of 32.*use 'cut'") as caught:
        opened(tmp_path, [LONG, LONG], truncate={"rule": rule})
    assert "\n" not in str(caught.value)


def test_a_held_out_set_without_one_is_an_error_too(tmp_path):
    held_out = write(tmp_path / "held.jsonl", [LONG, ("ab", "cd")])
    given = {"validation": held_out, "truncate": corpus.END}
    opened(tmp_path, [("ab", "cd")], **given)
    with pytest.raises(UserError, match=r"held-out set 'validation', jsonl:.*held\.jsonl: no token to train on"):
        opened(tmp_path, [("ab", "cd")], validation_batches=1, **given)  # the first batch is the long one
    with pytest.raises(UserError, match="held-out set 'validation'.*no token to train on"):
        long = {"packing": "concatenate", "length": 8, "validation_batches": 1, "validation": held_out}
        opened(tmp_path, [("ab", "cd")], **long)


def test_the_rule_is_part_of_the_fingerprint_where_it_decides_something(tmp_path):
    def fingerprint(examples, **truncate):
        return opened(tmp_path, examples, truncate=truncate).fingerprint

    assert len({fingerprint([LONG], **rule) for rule in ({}, {"min_targets": 3}, {"inputs": "right"})}) == 3
    assert len({fingerprint([("a", "b")], **rule) for rule in ({}, {"min_targets": 3}, corpus.END)}) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rule": "cutt"}, r"truncate\.rule='cutt' is unknown; did you mean 'cut'"),
        ({"inputs": "middle"}, r"truncate\.inputs='middle' should be left or right"),
        ({"min_targets": -1}, r"truncate\.min_targets=-1 should be at least 0"),
        ({"min_targets": 33}, r"truncate\.min_targets=33 should be at most length=32"),
        ({"rule": "drop", "min_targets": 3}, r"truncate\.rule='drop' reads neither inputs nor min_targets"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(given, expected):
    with pytest.raises(UsageError, match=expected):
        corpus.config(length=LENGTH, truncate=given)


def test_prepare_says_what_does_not_fit(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [LONG, ("ab", "cd")])
    given = {
        "source": source,
        "validation": source,
        "packing": "examples",
        "length": LENGTH,
        "validation_stride": 0,
        "tokenizer": "bytes",
    }
    given |= {f"fields.{name}": value for name, value in FIELDS.items()}
    flags = [f"--config.data.{name}={value}" for name, value in given.items()]
    assert main(["prepare", "--config=configs/pretrain/tiny.py", f"--workdir={tmp_path / 'run'}", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    for name in ("train", "validation"):
        expected = "1 examples do not fit a row: 1 lose tokens of their inputs, 0 of their targets"
        assert any(line.split(None, 1) == [name, f"{expected} (config.data.truncate)"] for line in said)
