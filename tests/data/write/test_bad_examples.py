"""A bad example of a SeqIO task follows config.data.on_bad_record; what the task's own code raises always stops."""

import pytest
import sentencepiece

from t5x_like.core.errors import UserError
from t5x_like.data.read.loader import open_data
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.write import prepare, workers
from tests.data import corpus

_TASKS = """
import os
import seqio
import tensorflow as tf

FOLDER = os.path.dirname(__file__)
PIECES = seqio.SentencePieceVocabulary(os.path.join(FOLDER, "pieces.model"))


def spoil(value, good=lambda line: line):
    # A preprocessor: example 1 is `value`, the others are what `good` makes of their lines.
    def change(number, line):
        return {"targets": tf.where(number == 1, tf.constant(value), good(line))}
    return lambda dataset: dataset.enumerate().map(change)


def as_ids(line):
    return tf.cast(tf.io.decode_raw(tf.strings.substr(line, 0, 3), tf.uint8), tf.int32)


SOURCE = seqio.TextLineDataSource({"train": [os.path.join(FOLDER, "lines.txt")]})


def add(name, *preprocessors, feature=None, vocabulary=seqio.PassThroughVocabulary(0), **options):
    feature = feature or seqio.Feature(vocabulary, add_eos=False, **options)
    seqio.TaskRegistry.add(name, source=SOURCE, output_features={"targets": feature},
                           preprocessors=list(preprocessors))


add("not_utf_8", spoil(b"bad\\xff"), rank=0, dtype=tf.string)
add("no_such_id", spoil([5000, 1, 1], as_ids))
add("negative_id", spoil([-1, 1, 1], as_ids))
add("fractions", spoil([0.5], lambda line: [1.5]), dtype=tf.float32)
add("a_table", spoil([[1]], lambda line: [[2]]), rank=2)
add("several_texts", lambda dataset: dataset.map(lambda line: {"targets": tf.strings.split(line, " ")}),
    rank=1, dtype=tf.string)
add("nothing_to_train", lambda dataset: dataset.map(lambda line: {"inputs": line}),
    feature=seqio.Feature(seqio.PassThroughVocabulary(0), required=False))
add("tokenized", spoil(b"bad\\xff"), seqio.preprocessors.tokenize, vocabulary=PIECES)
add("failing_late", lambda dataset: dataset.enumerate().map(lambda number, line: {
    "targets": [tf.strings.to_number(tf.where(number == 3, line, "1"), tf.int32)]}))


def fail(dataset):
    raise KeyError("no such column")


add("failing", fail)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A file that defines tasks over ten lines."""
    root = tmp_path_factory.mktemp("seqio")
    lines = [text.replace("\n", " ") for text in corpus.paragraphs(10)]
    (root / "lines.txt").write_text("\n".join(lines) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(root / "pieces"), vocab_size=400, hard_vocab_limit=False,
        byte_fallback=True, bos_id=-1, pad_id=0, eos_id=1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    (root / "tasks.py").write_text(_TASKS)
    return root / "tasks.py"


@pytest.fixture(scope="module")
def pool():
    with workers.Pool(1) as pool:
        yield pool


def encoded(module, tmp_path, pool, name, rule):
    """What the only shard of a task says of itself."""
    (tmp_path / "tokens").mkdir(exist_ok=True)
    tokenizer = str(module.parent / "pieces.model") if name == "tokenized" else "bytes"
    vocabularies.load(tokenizer).save(str(tmp_path / "vocabulary"))
    job = {"module": str(module), "name": name, "folder": str(tmp_path / "tokens"), "index": 0}
    job |= {"tokenizer": str(tmp_path / "vocabulary"), "token_type": "<u2", "shard": 0, "shards": 1}
    job["joined"] = False
    job |= {"files": [f"seqio:{module}:{name}#{name}-0"], "on_bad_record": rule, "chat": {}, "columns": ()}
    [facts] = pool.run("encode_task_shard", [job], lambda *_: None)
    return facts


@pytest.mark.parametrize("rule", ["stop", "skip"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing", "registers no such task; registered: "),
        ("failing:test", "has no split 'test'"),
        ("failing", "seqio:task failing, split train, shard 0: KeyError: 'no such column' ("),
        ("failing", "tasks.py, line "),
        ("failing_late", "seqio:task failing_late, split train, shard 0: example 3: InvalidArgumentError: "),
    ],
)
def test_mistakes_in_tasks_are_one_line_under_either_rule(module, tmp_path, pool, name, expected, rule):
    with pytest.raises(UserError) as caught:
        described = {"module": str(module), "name": name, "folder": str(tmp_path / "described")}
        pool.run("describe_task", [described], lambda *_: None)
        encoded(module, tmp_path, pool, name, rule)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("not_utf_8", 1, "targets is not UTF-8 at byte 3"),
        ("tokenized", 1, "targets_pretokenized is not UTF-8 at byte 3"),
        ("no_such_id", 1, "targets should be ids below 259, are array([5000, 1, 1]"),
        ("negative_id", 1, "targets should be ids below 259, are array([-1, 1, 1]"),
        ("fractions", 0, "targets should be a text, or a row of ids, is array([1.5]"),
        ("a_table", 0, "targets should be a text, or a row of ids, is array([[2]]"),
        ("several_texts", 0, "targets should be one text, is an array of shape ("),
        ("nothing_to_train", 0, "no feature 'targets' among inputs"),
    ],
)
def test_a_bad_example_is_named_or_left_out(module, tmp_path, pool, name, number, expected):
    """Of ten; one whose number is 0 is like all the others."""
    with pytest.raises(UserError) as caught:
        encoded(module, tmp_path, pool, name, "stop")
    message = str(caught.value)
    assert message.startswith(f"seqio:{module}:{name}#{name}-0: example {number}: {expected}") and "\n" not in message
    assert message.endswith("; mend it, or leave such records out: config.data.on_bad_record=skip")
    facts = encoded(module, tmp_path, pool, name, "skip")
    assert facts["bad"]["count"] == (1 if number else 10) and facts["documents"] == 10 - facts["bad"]["count"]
    assert facts["bad"]["first"][0][:2] == [0, number]


def test_bad_examples_are_left_out_up_to_a_share_and_named_at_the_start(module, tmp_path, capsys):
    source = f"seqio:{module}:not_utf_8"

    def prepared(**given):
        config = corpus.config(source=source, **given)
        return prepare.prepare(config, str(tmp_path), report=None), config

    done, config = prepared(on_bad_record="skip", max_bad_share=0.1)
    place = f"{source}#not_utf_8-0: example 1: targets is not UTF-8 at byte 3"
    assert (done.documents, done.bad, done.bad_places) == (9, 1, (place,))
    data = open_data(config, cache_dir=str(tmp_path), seed=0)
    assert data.describe()["components"]["train"]["bad"] == 1
    assert data._components[0].tokens.place(1) == (0, 2)  # the others keep their numbers
    # No shard is missing any more, so no worker runs; what was left out is known all the same.
    with pytest.raises(
        UserError, match=r"1 of 10 records are bad, which is more than .*=0.05; the first is .*example 1"
    ):
        prepared(on_bad_record="skip", max_bad_share=0.05)
    with pytest.raises(UserError, match="example 1: targets is not UTF-8 .*on_bad_record=skip"):
        prepared(on_bad_record="stop")
