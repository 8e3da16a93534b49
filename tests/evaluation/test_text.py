"""Claims about texts: the measure is that of training, whatever the batch; blocks add up; what cannot be read."""

import dataclasses
import json

import pytest

from configs import common
from t5x_like.core.config import build
from t5x_like.core.errors import UsageError
from t5x_like.data.config import DataConfig
from t5x_like.data.write import sources
from t5x_like.evaluation import statistics, text
from t5x_like.storage import model_directory
from tests.end_to_end.commands import ROOT, rows, train
from tests.evaluation import worlds

USUAL = common.config().data.to_dict()
INPUT = ROOT / "configs" / "data" / "tinyshakespeare" / "input.txt"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A text of 3 documents that no run has seen."""
    place = tmp_path_factory.mktemp("text") / "held_out.jsonl"
    whole = INPUT.read_text()
    parts = (whole[5000:11000], "A caf\u00e9.", whole[20000:29500])
    place.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return place


@pytest.fixture(scope="module")
def run(held_out, tmp_path_factory):
    """A function from overrides to a short run that holds this text out."""

    def start(*overrides, config="test"):
        workdir = tmp_path_factory.mktemp("run")
        given = [f"--config.data.validation=jsonl:{held_out}", "--config.data.validation_batches=0", *overrides]
        given += ["--config.loop.steps=2", "--config.optim.schedule.warmup_steps=0"]
        assert train(workdir, *given, config=str(ROOT / "configs" / "pretrain" / f"{config}.py")) == 0
        return workdir

    return start


def measured(subject, section, source, batch_tokens=1024):
    config = text.config_of(subject, section, source, usual=USUAL)
    return {metric.name: metric for metric in text.measure(subject, config, name="t", batch_tokens=batch_tokens)}


@pytest.mark.parametrize(
    "overrides",
    [(), ("--config.data.validation_stride=8",), ("--config.data.attend_across_documents=True",)],
    ids=["rows", "overlapping rows", "documents that see each other"],
)
def test_the_measure_of_a_text_is_that_of_training(overrides, run, held_out):
    workdir = run(*overrides)
    place = model_directory.locate(str(workdir))
    section = model_directory.read_metadata(place.checkpoint)["config"]["data"]
    found = measured(worlds.ours(workdir), section, f"jsonl:{held_out}")
    last = rows(workdir)[-1]
    for name, metric in found.items():
        assert metric.value == pytest.approx(last[f"eval/validation/{name}"], rel=1e-6), name
    # One observation for each 4096 bytes of each document, paired by its place.
    assert [key.rpartition(":")[2] for key in found["loss"].documents] == ["0", "1", "0", "0", "1", "2"]
    assert sum(item[1] for item in found["bits_per_byte"].items) == pytest.approx(15500 + 8, abs=1)
    assert 0 < found["bits_per_byte"].error < found["bits_per_byte"].value


def test_an_encoder_decoder_is_measured_as_its_run_does(run, held_out):
    given = ["--config.model.vocab_size=269", "--config.data.tokenizer=bytes", "--config.data.extra_ids=10"]
    given += ["--config.data.encoder_length=48", "--config.data.length=16", "--config.telemetry.plot=False"]
    given += ["--config.model.encoder.layers=1", "--config.model.decoder.layers=1", "--config.optim.name=adamw"]
    workdir = run(*given, config="t5_tiny")
    section = model_directory.read_metadata(model_directory.locate(str(workdir)).checkpoint)["config"]["data"]
    found = measured(worlds.ours(workdir), section, f"jsonl:{held_out}")
    last = rows(workdir)[-1]
    for name in ("loss", "accuracy"):
        assert found[name].value == pytest.approx(last[f"eval/validation/{name}"], rel=1e-6), name
    with pytest.raises(UsageError, match="came without one; evaluate it on --tasks"):
        text.config_of(worlds.ours(workdir), None, f"jsonl:{held_out}", usual=USUAL)


def test_a_model_without_a_run_reads_rows_of_its_own_length(folder_of, held_out):
    subject = worlds.ours(folder_of("stories"))
    found = measured(subject, None, f"jsonl:{held_out}")
    again = measured(subject, None, f"jsonl:{held_out}", batch_tokens=1)
    for name, metric in found.items():
        assert metric.value == pytest.approx(again[name].value, rel=1e-6) and metric.documents == again[name].documents
    assert 1 < found["bits_per_byte"].value < 8


def test_blocks_are_known_by_content_and_place(folder_of, tmp_path):
    """Equal documents are two observations; a copy of the file is the same text, one with another letter is not."""
    subject, said = worlds.ours(folder_of("stories")), ["Once upon a time. " * 300, "A little girl.", "A little girl."]

    def bits(name, documents):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return measured(subject, None, f"jsonl:{tmp_path / name}")["bits_per_byte"]

    before, copy = bits("a.jsonl", said), bits("b.jsonl", said)
    assert len(set(before.documents)) == len(before.documents) == 4
    first, second = (item[1] for item in before.items[-2:])
    assert first == second == pytest.approx(len(said[1]), abs=1)
    assert copy.documents == before.documents and statistics.difference(before, copy).documents == 4
    changed = bits("a.jsonl", [said[0], said[1], said[2].replace("girl", "bird")])
    places = [[key.partition(":")[2] for key in metric.documents] for metric in (before, changed)]
    assert places[0] == places[1] and not {*changed.documents} & {*before.documents}
    assert statistics.difference(before, changed) is None


def test_a_run_of_examples_through_a_template_reads_texts_as_texts(folder_of, tmp_path):
    subject, source = worlds.ours(folder_of("stories")), f"jsonl:{tmp_path / 'a.jsonl'}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Once upon a time. " * 20}) + "\n")
    plain = USUAL | {"length": 64, "fields": USUAL["fields"] | {"text": "text"}}
    fields = {"text": "", "inputs": "question", "targets": "answer"}
    asked = plain | {"packing": "examples", "fields": plain["fields"] | fields}
    asked |= {"chat": USUAL["chat"] | {"template": "plain"}}
    expected = measured(subject, plain, source)
    assert {name: metric.value for name, metric in measured(subject, asked, source).items()} == {
        name: metric.value for name, metric in expected.items()
    }


def test_a_model_without_a_run_is_read_by_the_usual_section_of_data(folder_of):
    """Whatever fields that gains: none of them is spelled out again."""
    subject = worlds.ours(folder_of("stories"))
    config = text.config_of(subject, None, "text:a.txt", usual=USUAL | {"attend_across_documents": True})
    expected = build(DataConfig, USUAL | {"source": "text:a.txt", "length": subject.max_length}, path="config.data")
    changed = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(expected, field.name)
    }
    assert config.attend_across_documents and changed == {"attend_across_documents"}


def test_the_kind_of_a_source_is_seen_from_its_name():
    for name, kind in {"a.txt": "text", "a.JSONL.gz": "jsonl", "a.tsv": "csv", "x/y.parquet": "parquet"}.items():
        assert text.source_of(name) == f"{kind}:{name}"
    assert text.source_of("lines:a") == "lines:a" and set(text._ENDINGS.values()) <= set(sources.KINDS)
