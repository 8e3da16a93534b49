"""TFDS and SeqIO for real: an ArrayRecord folder, and Tasks and a Mixture built from files, cached and read.

SeqIO runs in worker processes (TensorFlow takes seconds to import), so all of it shares one cache where it can.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import sentencepiece

from t5x_like.commands.prepare import summary
from t5x_like.core.errors import UsageError, UserError
from t5x_like.data import cache
from t5x_like.data.read import packing
from t5x_like.data.read.loader import open_data
from t5x_like.data.tokenizers import vocabularies
from t5x_like.data.write import prepare, tfds_reader
from t5x_like.storage import paths
from tests.data import corpus

_WRITE_TFDS = """
import json, os, sys
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tests.data import corpus

folder = os.path.join(sys.argv[1], "tiny", "1.0.0")
os.makedirs(folder)
features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in (
    "question", "answer", "messages", "tools")} | {
    "kind": tfds.features.ClassLabel(num_classes=3), "list": tfds.features.Sequence(tfds.features.Text()),
    "number": tfds.features.Tensor(shape=(2, 2), dtype=np.int64)})
template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name="tiny", filetype_suffix="array_record",
    template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
)
splits = []
for split, counts in (("train", [30, 3, 37]), ("test", [5]), ("bad", [5])):
    rest = list(enumerate(corpus.paragraphs(sum(counts))))
    for shard, count in enumerate(counts):
        path = os.path.join(folder, f"tiny-{split}.array_record-{shard:05d}-of-{len(counts):05d}")
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        for number, text in rest[:count]:
            question = b"bad \\xff" if split == "bad" and number == 3 else text
            writer.write(features.serialize_example(features.encode_example({
                "question": question, "answer": f"answer {number}",
                "messages": json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]),
                "tools": '[{"name": "add"}]' if split == "bad" and number == 2 else "[]",
                "kind": number % 3, "list": ["a", "b"], "number": [[1, 2], [3, 4]]})))
        writer.close()
        rest = rest[count:]
    splits.append(tfds.core.SplitInfo(name=split, shard_lengths=counts, num_bytes=1, filename_template=template))
tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=splits, filename_template=template, check_data=False
)
print(folder)
"""

_READ_TFDS = """
import json, sys
from t5x_like.data.write import sources
source = sources.parse(sys.argv[1], where="source")
[file] = sources.files(source, where="source")
records = [r.fields["question"] for r in sources.read("tfds", file.path, 10, file.measure, name=source.name)]
print(json.dumps([file.measure, records, "tensorflow" in sys.modules]))
"""

_TASKS = """
import functools
import os
import seqio
import tensorflow as tf

FOLDER = os.path.dirname(__file__)
PIECES = seqio.SentencePieceVocabulary(os.path.join(FOLDER, "pieces.model"), extra_ids=3)
FEATURES = {name: seqio.Feature(PIECES, add_eos=True) for name in ("inputs", "targets")}


def to_example(line):
    question_answer = tf.strings.split(line, "|")
    return {"inputs": question_answer[0], "targets": question_answer[1]}


def parse(dataset):
    return dataset.map(to_example, num_parallel_calls=tf.data.AUTOTUNE)


def source(name, shards=1):
    files = [os.path.join(FOLDER, f"{name}-{i}.txt") for i in range(shards)]
    return seqio.TextLineDataSource({"train": files, "validation": files[:1]})


for name, shards in (("long", 2), ("short", 1)):
    seqio.TaskRegistry.add(name, source=source(name, shards), output_features=FEATURES, preprocessors=[
        parse, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])

seqio.MixtureRegistry.add("both", ["long", "short"], default_rate=functools.partial(
    seqio.mixing_rate_num_examples, maximum=20))

TEXT = {"targets": seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, rank=0, dtype=tf.string)}
seqio.TaskRegistry.add("plain_text", source=source("short"), output_features=TEXT, preprocessors=[
    lambda dataset: dataset.map(lambda line: {"targets": line})])
"""


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    command = [sys.executable, "-c", _WRITE_TFDS, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def test_an_array_record_folder_is_read_without_tensorflow(tfds_folder):
    command = [sys.executable, "-c", _READ_TFDS, f"tfds:{tfds_folder}:train"]
    measure, records, tensorflow = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    assert measure == 70 and len(records) == 60 and not tensorflow
    assert set(records) < set(corpus.paragraphs(70))


def test_an_array_record_folder_becomes_batches(tfds_folder, tmp_path):
    fields = {"inputs": "question", "targets": "answer"}
    config = corpus.config(
        source=f"tfds:{tfds_folder}", fields=fields, validation="0.1", packing="examples", length=500
    )
    data = corpus.opened(config, tmp_path)
    facts = data.describe()
    assert (facts["components"]["train"]["documents"], facts["validation"]["validation"]["documents"]) == (63, 7)
    batch = data.rows(0, np.arange(4))
    predicted = data.vocabulary.decode(batch["targets"][batch["loss_weights"] > 0])
    assert predicted.startswith("answer ") and "fox" not in predicted
    assert all(place.unit == "record" and place.offset < 63 for place in data.documents(0))


def test_classes_of_an_array_record_folder_are_labels(tfds_folder, tmp_path):
    fields = {"text": "answer", "label": "kind"}
    given = {"features": "labels", "packing": "single", "length": 40}
    data = corpus.opened(corpus.config(source=f"tfds:{tfds_folder}:test", fields=fields, **given), tmp_path)
    assert sorted(data._components[0].tokens.columns["labels"].tolist()) == [0, 0, 1, 1, 2]


def test_bad_records_of_an_array_record_folder_are_named_or_left_out(tfds_folder, tmp_path):
    for field, expected in (
        ("question", r": record 3: field 'question' is not UTF-8 at byte 4; mend it, or leave .*=skip$"),
        ("list", r": record 0: field 'list' should be a text, is \[b'a', b'b'\]"),
        ("number", r": record 0: field 'number' should be a text, is \[\[1, 2\], \[3, 4\]\]"),
        ("kind", r": record 0: field 'kind' should be a text, is 0"),
        ("no", r": record 0: no field 'no' among "),
    ):
        config = corpus.config(source=f"tfds:{tfds_folder}:bad", fields={"text": field})
        with pytest.raises(UserError, match=expected) as caught:
            prepare.prepare(config, str(tmp_path), report=None)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(tfds_folder)
    given = {"on_bad_record": "skip", "max_bad_share": 0.2}
    config = corpus.config(source=f"tfds:{tfds_folder}:bad", fields={"text": "question"}, **given)
    done = prepare.prepare(config, str(tmp_path), report=None)
    assert (done.documents, done.bad) == (4, 1) and "record 3: field 'question'" in done.bad_places[0]


def test_conversations_of_an_array_record_folder_that_offer_tools_are_refused(tfds_folder, tmp_path):
    given = {"fields": {"messages": "messages"}, "chat": {"template": "plain"}, "packing": "examples", "length": 500}
    done = prepare.prepare(corpus.config(source=f"tfds:{tfds_folder}:test", **given), str(tmp_path), report=None)
    assert done.documents == 5
    with pytest.raises(UserError, match=r"record 2: field 'tools' offers tools, which is not supported; leave such"):
        prepare.prepare(corpus.config(source=f"tfds:{tfds_folder}:bad", **given), str(tmp_path), report=None)


def test_a_damaged_array_record_file_is_one_line(tfds_folder, tmp_path):
    folder = shutil.copytree(tfds_folder, tmp_path / "tiny" / "1.0.0")
    for file in folder.glob("*-train.array_record*"):
        content = bytearray(file.read_bytes())
        for place in range(100, len(content) - 100, 97):
            content[place] ^= 0xFF
        file.write_bytes(content)
    config = corpus.config(source=f"tfds:{folder}", fields={"text": "question"}, on_bad_record="skip")
    with pytest.raises(UserError, match="records 0 to 69 cannot be read .*; copy or write the files") as caught:
        prepare.prepare(config, str(tmp_path / "cache"), report=None)
    assert str(caught.value).startswith(f"tfds:{folder}:train: ") and "\n" not in str(caught.value)


def test_a_data_set_in_a_bucket_gives_the_tokens_of_the_one_on_a_disk(fake_gcs, tfds_folder, tmp_path, monkeypatch):
    """By the very names of the token sets; a process holds the copy of one file, and leaves none."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    bucket = f"{fake_gcs.bucket()}/tiny/1.0.0"
    paths.copy_tree(tfds_folder, bucket)
    copied: list[list[str]] = []
    copy = paths.copy_file

    def counted(source, target):
        copy(source, target)
        copied.append([name for name in os.listdir(os.path.dirname(target)) if "array_record" in name])

    monkeypatch.setattr(paths, "copy_file", counted)
    fields = {"text": "question"}
    for split, given in (
        ("train", {"validation": "0.1", "tokenizer": "train:bpe:300"}),
        ("train[10%:60%]", {}),
        ("train[40:]+test", {"validation": f"tfds:{bucket}:test"}),
    ):
        local = given | ({"validation": f"tfds:{tfds_folder}:test"} if "test" in split else {})
        here = corpus.config(source=f"tfds:{tfds_folder}:{split}", fields=fields, **local)
        there = corpus.config(source=f"tfds:{bucket[:-4]}*.0/:{split}", fields=fields, **given)
        before = prepare.prepare(here, str(tmp_path / "here"), report=None)
        after = prepare.prepare(there, str(tmp_path / "there"), report=None)
        assert before.documents > 30 and after.shards_written
        for part in ("train", "validation"):
            folders = [[e.folder for e in getattr(done.manifest, part).values()] for done in (before, after)]
            assert folders[0] == folders[1], (split, part)
    assert max(map(len, copied)) == 1 and not [name for name in os.listdir(tmp_path) if name.startswith("t5x_like")]
    copied.clear()
    again = prepare.prepare(there, str(tmp_path / "there"), report=None)
    assert again.shards_written == 0 and not any(copied)  # its settings alone tell that nothing changed


def test_a_data_set_in_a_bucket_that_is_too_large_or_missing_is_one_line(fake_gcs, tfds_folder, tmp_path, monkeypatch):
    bucket = fake_gcs.bucket()
    paths.copy_tree(tfds_folder, f"{bucket}/tiny")
    [first, *_] = [name for name in paths.list_names(f"{bucket}/tiny") if "train" in name]
    cases = {
        f"tfds:{bucket}/no": f"config.data.source=tfds:{bucket}/no:train: no such folder",
        f"tfds:{bucket}/t*y/no*": "no file or folder has a name like this",
        f"tfds:{bucket}/tiny:no": f"tfds:{bucket}/tiny:no: not readable as an ArrayRecord data set",
    }
    for source, expected in cases.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            prepare.prepare(corpus.config(source=source), str(tmp_path / "cache"), report=None)
    config = corpus.config(source=f"tfds:{bucket}/tiny", fields={"text": "question"})
    monkeypatch.setattr(tfds_reader, "_MOST_STAGED", paths.size(f"{bucket}/tiny/{first}") - 1)
    with pytest.raises(UserError, match=f"{first}: takes .* more than .*; write the data set in more files"):
        prepare.prepare(config, str(tmp_path / "cache"), report=None)


@pytest.mark.parametrize(("name", "expected"), [("nothing", "no such folder"), ("", "not readable as an ArrayRecord")])
def test_a_folder_that_is_no_data_set_is_named(tmp_path, name, expected):
    with pytest.raises(UserError, match=expected) as caught:
        prepare.prepare(corpus.config(source=f"tfds:{tmp_path / name}"), str(tmp_path / "cache"), report=None)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A file that defines SeqIO tasks over text files: `long` of 2 x 30 lines, `short` of 10."""
    root = tmp_path_factory.mktemp("seqio")
    texts = [text.replace("\n", " ").replace("|", "") for text in corpus.paragraphs(70)]
    for name, lines in (("long-0", texts[:30]), ("long-1", texts[30:60]), ("short-0", texts[60:])):
        content = "".join(f"question {number}|{line}\n" for number, line in enumerate(lines))
        (root / f"{name}.txt").write_text(content)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(root / "pieces"),
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        bos_id=-1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        minloglevel=2,
    )
    (root / "tasks.py").write_text(_TASKS)
    return root / "tasks.py"


@pytest.fixture(scope="module")
def prepared(module, tmp_path_factory):
    """(config of the mixture, folder of its cache, what was prepared, what was reported meanwhile)"""
    config = corpus.config(
        source=f"seqio:{module}:both",
        validation=f"seqio:{module}:short:validation",
        tokenizer="task",
        packing="examples",
        length=300,
    )
    folder = tmp_path_factory.mktemp("cache")
    seen = []
    return config, folder, prepare.prepare(config, str(folder), report=seen.append), seen


@pytest.fixture(scope="module")
def mixture(prepared):
    """(config of the mixture, folder of its cache)"""
    return prepared[:2]


def lines(module, name):
    return [line.partition("|")[2] for line in (module.parent / f"{name}.txt").read_text().split("\n") if line]


def test_a_mixture_is_cached_and_read_as_its_tasks(mixture, module):
    config, folder = mixture
    data = open_data(config, cache_dir=str(folder), seed=0)
    facts = data.describe()["components"]
    assert {name: component["documents"] for name, component in facts.items()} == {"long": 60, "short": 10}
    read = []
    for number, component in enumerate(data._components):
        packed = packing.pack(
            config.packing,
            component.tokens,
            length=config.length,
            stride=config.length,
            truncate=config.truncate,
            bos=None,
        )
        rows = packed.read(np.arange(packed.size.rows))
        assert (number, component.name) in ((0, "long"), (1, "short"))
        read += [data.vocabulary.decode(rows.tokens[row, : rows.valid[row]]) for row in range(len(rows.tokens))]
    text = "".join(read)
    normal = data.vocabulary.decode(data.vocabulary.encode(lines(module, "long-1")[3]))  # NFKC, spaces folded
    assert normal in text and len(normal) > 30


def test_examples_of_tasks_are_counted_while_they_are_written(prepared):
    """60 of long, 10 of short and its 10 held out, in four shards."""
    _, folder, done, seen = prepared
    assert seen[-1] == prepare.Writing("examples", 80, None) and {state.unit for state in seen} == {"examples"}
    assert [state.done for state in seen] == sorted(state.done for state in seen)
    assert done.shards_written == 4 and done.text_bytes_written == done.text_bytes > 0
    assert "MB/s of text" in summary(done, str(folder)) and "already" not in summary(done, str(folder))


def test_the_rates_of_a_mixture_are_those_that_seqio_computes(mixture):
    """Examples of long and short as 20 : 10, by its mixing_rate_num_examples with maximum 20."""
    data = open_data(mixture[0], cache_dir=str(mixture[1]), seed=0)
    facts = data.describe()["components"]
    examples = {n: f["share_of_rows"] * f["documents"] / f["rows"] for n, f in facts.items()}
    assert examples["long"] / examples["short"] == pytest.approx(2.0, rel=1e-3)


def test_rates_of_the_config_go_before_those_of_seqio(mixture):
    chosen = dataclasses.replace(mixture[0].mixture, rates={"long": 1.0, "short": 4.0})
    data = open_data(dataclasses.replace(mixture[0], mixture=chosen), cache_dir=str(mixture[1]), seed=0)
    facts = data.describe()["components"]
    examples = {n: f["share_of_rows"] * f["documents"] / f["rows"] for n, f in facts.items()}
    assert examples["short"] / examples["long"] == pytest.approx(4.0, rel=1e-3)


def test_inputs_of_a_task_carry_no_loss_and_bytes_are_those_of_the_text(mixture, module):
    data = open_data(mixture[0], cache_dir=str(mixture[1]), seed=0)
    batch = data.evaluation("validation")[0]
    trained = batch["loss_weights"] > 0
    predicted = data.vocabulary.decode(batch["targets"][trained])
    assert "question" not in predicted and "question" in data.vocabulary.decode(
        batch["inputs"][batch["segment_ids"] > 0]
    )
    eos = data.vocabulary.eos_id
    assert (batch["targets"][trained] == eos).sum() == 10 and (
        batch["target_bytes"][batch["targets"] == eos] == 0
    ).all()
    assert batch["target_bytes"].sum() == sum(len(line.encode()) for line in lines(module, "short-0"))
    places = data.documents(0)
    assert all(place.file.startswith(f"seqio:{module}:both#") and place.unit == "record" for place in places)


def test_the_vocabulary_of_a_task_is_kept_with_its_extra_ids(mixture, module):
    manifest = cache.read_manifest(mixture[0], str(mixture[1]))
    kept = vocabularies.load(str(mixture[1] / manifest.tokenizer))
    plain = vocabularies.load(str(module.parent / "pieces.model"))
    assert kept.size == plain.size + 3 and kept.encode("The quick fox") == plain.encode("The quick fox")


def test_a_task_whose_features_are_text_is_tokenized_with_the_tokenizer_of_the_config(module, tmp_path):
    data = corpus.opened(corpus.config(source=f"seqio:{module}:plain_text", tokenizer="bytes", length=400), tmp_path)
    batch = data.rows(0, np.arange(1))
    whole = (module.parent / "short-0.txt").read_text().replace("\n", "")
    assert data.vocabulary.decode(batch["targets"][0])[5:60] in whole
    assert data.describe()["components"]["train"]["bytes"] == len(whole.encode())


def test_a_second_prepare_of_tasks_starts_no_worker(mixture, monkeypatch):
    monkeypatch.setattr("t5x_like.data.write.workers._Worker", None)
    again = prepare.prepare(mixture[0], str(mixture[1]), report=None)
    assert again.manifest == cache.read_manifest(mixture[0], str(mixture[1])) and again.shards_written == 0
    assert "(all there already)" in summary(again, str(mixture[1]))


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [("bytes", "is not the vocabulary of the SeqIO task; use task"), ("train:bpe:300", "needs text")],
)
def test_tasks_bring_their_vocabulary(mixture, tokenizer, expected):
    config = dataclasses.replace(mixture[0], tokenizer=tokenizer)
    with pytest.raises(UsageError, match=expected):
        prepare.prepare(config, str(mixture[1]), report=None)
