"""Every kind of bad input to the commands ends in one line and the right status, and loses nothing that was there.

The tables here are those of `train`, `generate` and paths; of instruction tuning, preferences, adapters and rewards
test_bad_post_training.py, of exports and evaluations test_bad_models.py, of `rl` test_rl.py.
"""

import dataclasses
import gzip
import json
import shutil

import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.core.errors import UsageError
from tests.end_to_end.commands import ROOT, sizes, train, unfinished


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_config_of_no_sections_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert train(tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds config.json but no start in manifest.json" in line


def test_inspect_of_a_step_without_the_manifest_is_one_line(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "manifest.json").unlink()
    assert main(["inspect", str(workdir), "--step=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no start in manifest.json" in line


def test_an_empty_prompt_of_a_tokenizer_without_special_tokens_is_one_line(finished):
    lm = t5x_like.load(str(finished))

    class Bare:
        eos_id = None

        def encode(self, text, bos=False):
            return []

    with pytest.raises(UsageError, match="an empty prompt needs"):
        dataclasses.replace(lm, vocabulary=Bare()).generate("", max_new_tokens=2)


# {files} holds files that cannot be read as they are named, {finished} is a finished run.
BAD_CONFIG = {
    "an unknown key": (["--config.loop.stepz=5"], 2, "stepz"),
    "a wrong type": (["--config.loop.steps=2.5"], 2, "steps"),
    "an unknown optimizer": (["--config.optim.name=adamx"], 2, "did you mean 'adamw'"),
    "a field of a variant that is not named": (["--config.optim.lion.b1=0.5"], 2, "config.optim.name='adamw'"),
    "an unknown activation": (["--config.model.decoder.activation=sillu"], 2, "did you mean 'silu'"),
    "an unknown remat policy": (["--config.model.remat=ful"], 2, "did you mean 'full'"),
    "a batch that does not divide": (["--config.data.batch_size=12"], 2, "config.data.batch_size=12 is not divisible"),
    "a mesh that does not fit": (["--config.mesh.tensor=3"], 2, "does not divide the 8 devices"),
    "heads that do not divide": (
        ["--config.mesh.preset=fsdp_tensor", "--config.mesh.tensor=8"],
        2,
        "'heads' of size 4",
    ),
    "a rule that changes nothing": (["--config.mesh.rules=mlp=tensor"], 2, "changes nothing"),
    "a rule for an absent axis": (["--config.mesh.rules=experts=fsdp"], 2, "no parameter of this model"),
    "rules that match nothing": (
        ["--config.optim.decay=(('nope', 0.0), ('.*', 1.0))"],
        2,
        "'nope' matches no parameter",
    ),
    "text that is not UTF-8": (
        ["--config.data.source=text:{files}/broken.txt"],
        1,
        "broken.txt: byte 0xff at offset 3",
    ),
    "an empty file": (["--config.data.source=text:{files}/empty.txt"], 1, "empty.txt: the file is empty"),
    "one JSON array": (["--config.data.source=jsonl:{files}/array.json"], 1, "array.json: begins with a JSON array"),
    "an archive that is not read": (["--config.data.source=text:{files}/text.zip"], 1, "text.zip: is a zip archive"),
    "half a compressed file": (["--config.data.source=text:{files}/half.gz"], 1, "half.gz: its gzip data is damaged"),
    "a null in a record": (
        ["--config.data.source=jsonl:{files}/null.jsonl"],
        1,
        "null.jsonl:2 (byte 14): field 'text' should be a text, is null; mend it, or leave such records out",
    ),
    "more bad records than allowed": (
        ["--config.data.source=jsonl:{files}/null.jsonl", "--config.data.on_bad_record=skip"],
        1,
        "1 of 2 records are bad, which is more than config.data.max_bad_share=0.01",
    ),
    "a rule for bad records that is none": (["--config.data.on_bad_record=skp"], 2, "did you mean 'skip'"),
    "a list of files with one that is missing": (
        ["--config.data.source=text:{files}/array.json,{files}/no.txt"],
        1,
        "no.txt: no such file",
    ),
    "a workdir of another config": (
        ["--workdir={finished}", "--config.optim.weight_decay=0.5"],
        2,
        "config.optim.weight_decay: 0.0 -> 0.5",
    ),
    "parameters of another tokenizer": (
        [
            "--config.checkpoint.init_from={finished}",
            "--config.data.tokenizer=train:bpe:300",
            "--config.model.vocab_size=300",
        ],
        1,
        "was trained with another tokenizer",
    ),
    "a kind of source that is none": (["--config.data.source=txt:a"], 2, "did you mean 'text'"),
    "a missing file": (["--config.data.source=text:no/such/file.txt"], 1, "no/such/file.txt"),
    "a pattern that no model matches": (
        ["--config.checkpoint.init_from={files}/no-*"],
        1,
        "config.checkpoint.init_from={files}/no-*: no file or folder has a name like this",
    ),
    "a pattern that several models match": (
        ["--config.checkpoint.init_from={files}/{{empty,broken}}.txt"],
        1,
        "empty,broken}}.txt matches 2 paths ({files}/broken.txt, {files}/empty.txt); expected just one",
    ),
    "a pattern of a branch that several runs match": (
        ["--config.checkpoint.branch_from={files}/*.txt@3"],
        1,
        "config.checkpoint.branch_from={files}/*.txt matches 2 paths",
    ),
    "a pattern that several tokenizers match": (
        ["--config.data.tokenizer={files}/*.txt"],
        1,
        "config.data.tokenizer={files}/*.txt matches 2 paths",
    ),
    "a pattern that no data set matches": (
        ["--config.data.source=tfds:{files}/no-*:train"],
        1,
        "config.data.source=tfds:{files}/no-*: no file or folder has a name like this",
    ),
    "a held-out file that is missing": (
        ["--config.data.validation=text:{files}/no-*.txt"],
        1,
        "config.data.validation=text:{files}/no-*.txt: no file has a name like this",
    ),
    "tasks in a bucket": (["--config.data.source=seqio:gs://b/tasks.py:t"], 2, "is read from a disk; copy it there"),
    "a wrong vocabulary size": (["--config.model.vocab_size=300"], 2, "set config.model.vocab_size=259"),
    "a spike test that is silent for ever": (["--config.loop.spike_deviations=nan"], 2, "should be a finite number"),
    "a loss of no number": (["--config.objective.lm.z_loss=nan"], 2, "z_loss=nan should be a finite number"),
    "a norm of nothing": (["--config.model.decoder.norm_epsilon=inf"], 2, "norm_epsilon=inf should be a finite number"),
    "angles of no factor": (
        ["--config.model.decoder.rope.scaling.name=linear", "--config.model.decoder.rope.scaling.linear.factor=0.0"],
        2,
        "factor=0.0 should be above 0",
    ),
    "windows that no layer has": (
        ["--config.model.decoder.windows=(4, 4, 0)"],
        2,
        "windows=(4, 4, 0) is longer than config.model.decoder.layers=2",
    ),
    "an objective that is none": (["--config.objective.name=lmm"], 2, "did you mean 'lm'"),
    "a packing that is none": (["--config.data.packing=concat"], 2, "did you mean 'concatenate'"),
    "a negative seed": (["--config.seed=-1"], 2, "config.seed=-1"),
    "rows longer than the model's": (["--config.data.length=256"], 2, "config.model.max_length=128"),
    "a decay of 1": (["--config.loop.ema_decay=1.0"], 2, "config.loop.ema_decay=1 should lie between 0 and 1"),
    "a spike at once": (["--config.loop.spike_warmup=0"], 2, "config.loop.spike_warmup=0 should be at least 2"),
    "an average too fine for its type": (
        ["--config.loop.ema_decay=0.99", "--config.model.dtype.params=bfloat16"],
        2,
        "config.loop.ema_decay=0.99 needs config.model.dtype.params='float32'",
    ),
    "nothing to train": (["--config.optim.freeze=(('.*', True),)"], 2, "config.optim.freeze leaves no parameter"),
    "best by what is not measured": (
        ["--config.checkpoint.best_metric=eval/valid/loss"],
        2,
        "did you mean 'eval/validation/loss'",
    ),
    "a norm that divides by nothing": (
        ["--config.model.decoder.norm_epsilon=-1.0"],
        2,
        "norm_epsilon=-1 should be above 0",
    ),
    "no angles": (["--config.model.decoder.rope.theta=(0.0,)"], 2, "rope.theta=(0.0,) should be numbers above 0"),
    "a schedule of no steps": (["--config.optim.schedule.steps=0"], 2, "config.optim.schedule.steps=0"),
    "all smoothed": (["--config.objective.lm.label_smoothing=1.0"], 2, "label_smoothing=1 should be in [0, 1)"),
    "best by a metric that checkpoints miss": (
        ["--config.checkpoint.best_metric=eval/validation/loss", "--config.evaluate.every_steps=7"],
        2,
        "multiple of config.evaluate.every_steps",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_input_is_one_line_and_loses_nothing(case, finished, tmp_path, capsys):
    before = sizes(finished)
    (tmp_path / "broken.txt").write_bytes(b"gut" + b"\xff\xfe" + b"x" * 100)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "array.json").write_text('[\n{"text": "a"},\n{"text": "b"}\n]')
    (tmp_path / "text.zip").write_bytes(b"PK\x03\x04" + b"x" * 100)
    (tmp_path / "half.gz").write_bytes(gzip.compress(b"some text" * 100)[:30])
    (tmp_path / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    arguments, status, part = BAD_CONFIG[case]
    arguments = [argument.format(files=tmp_path, finished=finished) for argument in arguments]
    assert train(tmp_path / "run", *arguments) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    part = part.format(files=tmp_path) if "{files}" in part else part
    assert len(errors) == 1 and errors[0].startswith("t5x_like: ") and part in errors[0], errors
    assert not (tmp_path / "run" / "config.json").exists() and sizes(finished) == before


BAD_RESUME = {
    "an unknown key": ("--config.loop.stepz=5", "stepz"),
    "an unknown section": ("--config.nope=5", "nope"),
    "a wrong type where the stored config holds None": ("--config.mesh.tensor=two", "config.mesh.tensor='two'"),
    "a shorter run than there is": ("--config.loop.steps=5", "has a checkpoint of step 10; use at least 10"),
}


@pytest.mark.parametrize("case", BAD_RESUME)
def test_a_bad_override_of_a_stored_config_is_one_line(case, finished, tmp_path, capsys):
    workdir = unfinished(finished, tmp_path)
    before = (workdir / "config.json").read_bytes()
    argument, part = BAD_RESUME[case]
    assert train(workdir, argument, config=None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ") and part in line
    assert (workdir / "config.json").read_bytes() == before and (workdir / "checkpoints" / "10").exists()


def test_a_resume_on_other_text_is_refused(tmp_path, capsys):
    """The config is the same: it names a file whose content is another."""
    text = tmp_path / "a.txt"
    text.write_text("to be, or not to be, that is the question\n" * 200)
    source = (f"--config.data.source=text:{text}", "--config.data.validation=")
    assert train(tmp_path / "run", *source, "--config.loop.steps=4") == 0
    config = (tmp_path / "run" / "config.json").read_bytes()
    text.write_text("so shaken as we are, so wan with care\n" * 200)
    assert train(tmp_path / "run", "--config.loop.steps=5", config=None) == 1
    assert "the data has changed since the run was started" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    assert main(["inspect", str(tmp_path / "run"), "--step=2"]) == 1
    assert "holds other data than" in capsys.readouterr().err
    text.write_text("to be, or not to be, that is the question\n" * 200)
    assert train(tmp_path / "run", "--config.loop.steps=5", config=None) == 0


def test_a_folder_that_is_no_workdir_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train(tmp_path) == 1
    assert "is no workdir" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_tokenizer_of_another_run_is_refused(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    settings = json.loads((workdir / "tokenizer" / "vocabulary.json").read_text())
    (workdir / "tokenizer" / "vocabulary.json").write_text(json.dumps(settings | {"extra_ids": 5}))
    assert main(["generate", str(workdir), "--prompt=a"]) == 1
    assert "tokenizer" in capsys.readouterr().err


BAD_TEXT = {
    "a prompt of other bytes": ["--prompt=a\udcff"],
    "a seed below 0": ["--prompt=a", "--seed=-1"],
    "a seed of too many digits": ["--prompt=a", f"--seed={10**20}"],
    "a temperature below 0": ["--prompt=a", "--temperature=-1"],
    "a share of nothing": ["--prompt=a", "--top_p=0"],
    "a type that is none": ["--prompt=a", "--dtype=int9"],
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_what_cannot_be_generated_is_one_line(case, finished, capsys):
    assert main(["generate", str(finished), *BAD_TEXT[case]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ")


BAD_PATH = {
    "no run": (["train", "--workdir={files}/no-*"], 1, "--workdir={files}/no-*: no file or folder has a name like"),
    "several runs": (["train", "--workdir={files}/run-[12]"], 1, "matches 2 paths ({files}/run-1, {files}/run-2)"),
    "several models": (["generate", "{files}/run-*", "--prompt=a"], 1, "DIR={files}/run-* matches 2 paths"),
    "several to inspect": (["inspect", "{files}/run-1,{files}/run-2"], 1, "matches 2 paths"),
    "several to convert": (["convert", "{files}/run-?", "{files}/new"], 1, "SRC={files}/run-? matches 2 paths"),
    "several configs": (["train", "--config={files}/*.py", "--workdir={files}/new"], 1, "a.py, {files}/b.py)"),
    "a config in a bucket": (["train", "--config=gs://b/c.py:x", "--workdir={files}/new"], 2, "copy it there"),
    "a plan in a bucket": (
        ["plan", "--config=tiny", "--topology=v5e:2x4", "--json=gs://b/plan.json"],
        1,
        "a plan is written to a disk",
    ),
}


@pytest.mark.parametrize("case", BAD_PATH)
def test_a_path_that_is_not_just_one_is_one_line(case, tmp_path, capsys):
    for name in ("run-1", "run-2"):
        (tmp_path / name).mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("raise SystemExit")
    arguments, status, part = BAD_PATH[case]
    assert main([argument.replace("{files}", str(tmp_path)) for argument in arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ") and part.replace("{files}", str(tmp_path)) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.py", "b.py", "run-1", "run-2"]


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["generate", "x"], ["train", "--config=nope.py", "--workdir=x"]]
)
def test_wrong_use_exits_2(arguments, capsys):
    assert main(arguments) == 2
    capsys.readouterr()
