"""The commands as a user calls them, in process: train, stop, resume, refuse, generate, and every kind of bad input.

All runs are on 8 fake devices with the smallest config; one workdir with a finished run is shared and only read.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.core.errors import UsageError
from t5x_like.data.read.loader import open_data
from t5x_like.data.tokenizers import tokenizer_training
from t5x_like.runs import train as experiments
from t5x_like.runs import training_run
from t5x_like.storage import model_directory, paths, workdir
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.training.faults import PREEMPTED

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "configs/pretrain/test.py"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def _train(workdir: pathlib.Path, *arguments: str, config: str | None = CONFIG) -> int:
    chosen = [f"--config={config}"] if config else []
    return main(["train", *chosen, f"--workdir={workdir}", *arguments])


def _rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _values(workdir: pathlib.Path) -> list[tuple]:
    """What must be equal between two runs: every row without time and rates."""
    kept = ("train/loss", "train/grad_norm", "train/learning_rate", "eval/validation/loss", "eval/validation/accuracy")
    return [(row["step"], *(row.get(name) for name in kept)) for row in _rows(workdir)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 12 steps: the schedule's length is 12."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert _train(workdir, "--config.loop.steps=12") == 0
    return workdir


def _unfinished(finished: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy that stopped after 10 steps (an earlier checkpoint than the last row), as a kill would leave it."""
    workdir = folder / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    manifest = json.loads((workdir / "manifest.json").read_text())
    del manifest["finished"]
    (workdir / "manifest.json").write_text(json.dumps(manifest))
    return workdir


def test_a_workdir_holds_all_that_a_run_leaves(finished):
    for name in ("config.json", "overrides.json", "manifest.json", "metrics.jsonl", "log.txt", "tokenizer"):
        assert (finished / name).exists(), name
    assert json.loads((finished / "overrides.json").read_text()) == {"loop.steps": 12}
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert steps == [10, 12]
    rows = _rows(finished)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval/validation/loss" in row] == [10, 12]
    last = rows[-1]
    assert {"eval/validation/bits_per_byte", "eval/validation/perplexity", "eval/validation/accuracy"} <= last.keys()
    # Bytes are tokens here, so bits per byte are the loss in other units (the end of text is no byte).
    assert last["eval/validation/bits_per_byte"] == pytest.approx(last["eval/validation/loss"] / 0.6931, rel=0.01)


def test_the_loss_falls(finished):
    losses = [row["train/loss"] for row in _rows(finished) if "train/loss" in row]
    assert losses[0] == pytest.approx(5.55, abs=0.1) and losses[-1] < 4.5


def test_a_finished_run_says_so_and_exits_0(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert _train(finished, config=None) == 0
    assert "is finished: 12 of 12 steps" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["is missing", "is damaged"])
def test_a_finished_run_whose_last_checkpoint_is_lost_trains_the_lost_steps_again(finished, tmp_path, capsys, damage):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    last = workdir / "checkpoints" / "12"
    if damage == "is missing":
        shutil.rmtree(last)
    else:
        for path in (last / "params").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000 and path.parent.name == "d":
                path.write_bytes(bytes(path.stat().st_size))
    assert _train(workdir, config=None) == 0
    captured = capsys.readouterr()
    assert f"was finished at step 12, but the checkpoint of that step {damage}" in captured.err
    assert "is finished" not in captured.out
    assert _values(workdir) == _values(finished) and last.is_dir()
    assert _train(workdir, config=None) == 0
    assert "is finished: 12 of 12 steps" in capsys.readouterr().out


def test_a_config_of_no_sections_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert _train(tmp_path) == 1
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


def test_a_stopped_and_resumed_run_has_the_rows_of_an_undisturbed_one(finished, tmp_path):
    workdir = _unfinished(finished, tmp_path)
    assert _train(workdir, config=None) == 0
    assert _values(workdir) == _values(finished)
    starts = json.loads((workdir / "manifest.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, 10]


def test_a_checkpoint_that_a_signal_left_unevaluated_is_judged_at_the_resume_for_good(finished, tmp_path, monkeypatch):
    """SIGTERM in the midst of the evaluation of step 10; best_metric needs what it would have given."""
    workdir, whole = tmp_path / "run", training_run.HeldOutBatches.__iter__

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from whole(self)

    chosen = ("--config.checkpoint.best_metric=eval/validation/loss", f"--config.data.cache={finished / 'cache'}")
    with monkeypatch.context() as patch:
        patch.setattr(training_run.HeldOutBatches, "__iter__", interrupted)
        assert _train(workdir, "--config.loop.steps=12", *chosen) == PREEMPTED

    def judged():
        return Checkpoints(str(workdir / "checkpoints"), read_only=True).metrics(10)

    assert judged() == {} and (workdir / "checkpoints" / "10").is_dir()
    assert _train(workdir, config=None) == 0
    assert _values(workdir) == _values(finished)
    (row,) = [row for row in _rows(workdir) if row["step"] == 10 and "eval/validation/loss" in row]
    assert judged()["eval/validation/loss"] == row["eval/validation/loss"]


def test_a_resume_may_change_mesh_and_length_and_reads_the_same_batches(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    # Fields of which the stored config holds None too.
    fields = ("--config.mesh.preset=fsdp_tensor", "--config.mesh.tensor=2", "--config.checkpoint.keep_every=7")
    assert _train(workdir, "--config.loop.steps=14", *fields, config=None) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["loop"]["steps"] == 14 and config["optim"]["schedule"]["steps"] == 12
    assert config["mesh"]["tensor"] == 2 and config["checkpoint"]["keep_every"] == 7
    assert _values(workdir)[: len(_values(finished))] == _values(finished)
    assert [row["step"] for row in _rows(workdir) if "train/loss" in row] == list(range(1, 15))


def test_a_resume_on_another_mesh_stays_within_a_small_tolerance(finished, tmp_path):
    workdir = _unfinished(finished, tmp_path)
    assert _train(workdir, "--config.mesh.preset=fsdp_tensor_sequence", config=None) == 0
    rows = list(zip(_values(finished), _values(workdir), strict=True))
    assert [one[0] for one, two in rows if one != two][0] > 10, "after the resume it computes in another order"
    for one, two in rows:
        assert [value for value in two if value is not None] == pytest.approx(
            [value for value in one if value is not None], rel=1e-5
        )


def test_micro_batches_give_the_losses_of_whole_batches(finished, tmp_path):
    arguments = ("--config.loop.steps=12", "--config.loop.micro_batches=2", "--config.mesh.preset=fsdp_tensor")
    assert _train(tmp_path / "run", *arguments) == 0
    for one, two in zip(_values(finished), _values(tmp_path / "run"), strict=True):
        assert [value for value in two if value is not None] == pytest.approx(
            [value for value in one if value is not None], rel=2e-5
        )


def test_check_builds_everything_prints_the_summary_and_writes_nothing(tmp_path, capsys):
    cache = tmp_path / "cache"
    assert _train(tmp_path / "run", "--check", f"--config.data.cache={cache}") == 0
    shown = capsys.readouterr().out
    blockwise = "blockwise: blocks of queries"
    for part in ("26.9k", "fsdp=8", "activations", "held out", "embed/tokens", "adamw", "attention", blockwise):
        assert part in shown
    assert not (tmp_path / "run" / "config.json").exists()


def test_generate_prints_prompt_and_continuation_and_repeats_for_a_seed(finished, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert main(["generate", str(finished), "--prompt=To be", "--max_new_tokens=20", f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("To be") and len(texts[0]) > 10
    assert texts[0] == texts[1] != texts[2]


def test_the_python_interface_agrees_with_itself(finished):
    lm = t5x_like.load(str(finished))
    tokens = np.array([lm.vocabulary.encode("To be, or not")])
    logits = lm.logits(tokens)
    assert logits.shape == (1, tokens.shape[1], 259)
    logp = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    expected = sum(logp[i - 1, tokens[0, i]] for i in range(5, tokens.shape[1]))
    ((value, greedy),) = lm.log_likelihood(["To be"], [", or not"])
    assert value == pytest.approx(expected, rel=1e-4) and not greedy
    (whole,) = lm.logits([[lm.vocabulary.eos_id, *tokens[0]]])
    whole = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
    ((value, _),) = lm.log_likelihood([""], ["To be, or not"])
    assert value == pytest.approx(sum(whole[i, token] for i, token in enumerate(tokens[0])), rel=1e-4)
    assert lm.log_likelihood(["", "To be"], ["", ""]) == [(0.0, True)] * 2
    assert lm.generate([], max_new_tokens=5) == []
    continuation = lm.generate(["To be"], max_new_tokens=5, temperature=0)[0]
    assert lm.log_likelihood(["To be"], [continuation])[0][1]


def test_a_model_is_read_whatever_trained_it(finished, tmp_path):
    """Of the stored config only the section `model` counts: a converted model has no other."""
    shutil.copytree(finished / "checkpoints" / "12", tmp_path / "model")
    shutil.copytree(finished / "tokenizer", tmp_path / "model" / "tokenizer")
    path = tmp_path / "model" / "metadata" / "metadata"
    content = json.loads(path.read_text())
    content["config"] = {"model": content["config"]["model"]}
    del content["provenance"]
    path.write_text(json.dumps(content | {"sha256": model_directory.digest(content)}))
    tokens = np.array([[1, 2, 3]])
    models = [t5x_like.load(str(folder)) for folder in (tmp_path / "model", finished)]
    assert np.array_equal(models[0].logits(tokens), models[1].logits(tokens))


def test_inspect_says_where_in_the_text_each_row_of_a_step_lies(finished, capsys):
    """The text is one file, one document: its offset alone would say nothing."""
    assert main(["inspect", str(finished), "--step=3"]) == 0
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith(": 8 documents in the batch of step 3") and "text from" in header
    experiment = experiments.from_config(workdir.read_config(str(finished)) or {})
    data = open_data(experiment.data, cache_dir=str(finished / "cache"), seed=experiment.seed)
    inputs = data.rows(2, np.arange(8))["inputs"]
    data.close()
    for row, line in enumerate(lines):
        number, _, _, offset, _, text_byte, _, _, file = line.split()
        at = int(offset) + int(text_byte)
        assert int(number) == row and at > 0
        assert pathlib.Path(file).read_bytes()[at : at + 32] == data.vocabulary.decode_bytes(inputs[row])


# {files} holds broken.txt and empty.txt, {finished} is a finished run.
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
    "a workdir of another config": (
        ["--workdir={finished}", "--config.optim.learning_rate=0.5"],
        2,
        "config.optim.learning_rate: 0.01 -> 0.5",
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


def _sizes(workdir: pathlib.Path) -> dict[str, int]:
    """Every file but the lock, which says who looked last."""
    return {name: size for name, size in paths.tree_files(str(workdir)).items() if name != "lock"}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_input_is_one_line_and_loses_nothing(case, finished, tmp_path, capsys):
    before = _sizes(finished)
    (tmp_path / "broken.txt").write_bytes(b"gut" + b"\xff\xfe" + b"x" * 100)
    (tmp_path / "empty.txt").write_bytes(b"")
    arguments, status, part = BAD_CONFIG[case]
    arguments = [argument.format(files=tmp_path, finished=finished) for argument in arguments]
    assert _train(tmp_path / "run", *arguments) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    assert len(errors) == 1 and errors[0].startswith("t5x_like: ") and part in errors[0], errors
    assert not (tmp_path / "run" / "config.json").exists() and _sizes(finished) == before


BAD_RESUME = {
    "an unknown key": ("--config.loop.stepz=5", "stepz"),
    "an unknown section": ("--config.nope=5", "nope"),
    "a wrong type where the stored config holds None": ("--config.mesh.tensor=two", "config.mesh.tensor='two'"),
    "a shorter run than there is": ("--config.loop.steps=5", "has a checkpoint of step 10; use at least 10"),
}


@pytest.mark.parametrize("case", BAD_RESUME)
def test_a_bad_override_of_a_stored_config_is_one_line(case, finished, tmp_path, capsys):
    workdir = _unfinished(finished, tmp_path)
    before = (workdir / "config.json").read_bytes()
    argument, part = BAD_RESUME[case]
    assert _train(workdir, argument, config=None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ") and part in line
    assert (workdir / "config.json").read_bytes() == before and (workdir / "checkpoints" / "10").exists()


def test_a_resume_finds_its_text_elsewhere_and_does_not_ask_for_its_tokenizer(tmp_path, capsys):
    text, tokenizer = tmp_path / "a.txt", tmp_path / "tokenizer"
    text.write_text("to be, or not to be, that is the question\n" * 200)
    tokenizer_training.train("bpe", 270, [text.read_text()]).save(str(tokenizer))
    given = [f"--config.data.source=text:{text}", "--config.data.validation=", f"--config.data.tokenizer={tokenizer}"]
    given += ["--config.model.vocab_size=270", f"--config.data.cache={tmp_path / 'cache'}"]
    assert _train(tmp_path / "run", *given, "--config.loop.steps=4") == 0
    shutil.rmtree(tokenizer)
    shutil.rmtree(tmp_path / "cache")
    assert _train(tmp_path / "run", "--config.loop.steps=5", config=None) == 0
    text.rename(tmp_path / "b.txt")
    shutil.rmtree(tmp_path / "cache")
    assert _train(tmp_path / "run", "--config.loop.steps=6", config=None) == 1
    assert "a.txt: no such file" in capsys.readouterr().err
    moved = f"--config.data.source=text:{tmp_path / 'b.txt'}"
    assert _train(tmp_path / "run", moved, "--config.loop.steps=6", config=None) == 0
    assert "config.data.source: 'text:" in capsys.readouterr().out
    starts = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert len({start["data"] for start in starts}) == 1 and len(starts) == 3
    other = f"--config.data.tokenizer={tmp_path / 'none'}"  # another one is named: it must be there
    assert _train(tmp_path / "run", other, "--config.loop.steps=7", config=None) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_a_resume_on_other_text_is_refused(tmp_path, capsys):
    """The config is the same: it names a file whose content is another."""
    text = tmp_path / "a.txt"
    text.write_text("to be, or not to be, that is the question\n" * 200)
    source = (f"--config.data.source=text:{text}", "--config.data.validation=")
    assert _train(tmp_path / "run", *source, "--config.loop.steps=4") == 0
    config = (tmp_path / "run" / "config.json").read_bytes()
    text.write_text("so shaken as we are, so wan with care\n" * 200)
    assert _train(tmp_path / "run", "--config.loop.steps=5", config=None) == 1
    assert "the data has changed since the run was started" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    assert main(["inspect", str(tmp_path / "run"), "--step=2"]) == 1
    assert "holds other data than" in capsys.readouterr().err
    text.write_text("to be, or not to be, that is the question\n" * 200)
    assert _train(tmp_path / "run", "--config.loop.steps=5", config=None) == 0


def test_a_tokenizer_that_a_kill_left_half_written_is_written_again(finished, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "tokenizer").mkdir(parents=True)  # a first start that got no further
    cache = f"--config.data.cache={finished / 'cache'}"
    assert _train(workdir, cache, "--config.loop.steps=1", "--config.optim.schedule.warmup_steps=0") == 0
    assert (workdir / "tokenizer" / "vocabulary.json").read_bytes() == (
        finished / "tokenizer" / "vocabulary.json"
    ).read_bytes()


def test_a_folder_that_is_no_workdir_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert _train(tmp_path) == 1
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
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_what_cannot_be_generated_is_one_line(case, finished, capsys):
    assert main(["generate", str(finished), *BAD_TEXT[case]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ")


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["generate", "x"], ["train", "--config=nope.py", "--workdir=x"]]
)
def test_wrong_use_exits_2(arguments, capsys):
    assert main(arguments) == 2
    capsys.readouterr()


def test_a_warm_start_takes_the_chosen_parameters(finished, tmp_path, capsys):
    arguments = [
        f"--config.checkpoint.init_from={finished}",
        "--config.loop.steps=1",
        "--config.optim.schedule.warmup_steps=0",
    ]
    assert _train(tmp_path / "all", *arguments) == 0
    first = _rows(tmp_path / "all")[0]["train/loss"]
    assert first < 4.5 < _rows(finished)[0]["train/loss"]
    assert _train(tmp_path / "some", *arguments, "--config.checkpoint.init_select=('embed/.*',)") == 0
    assert "1 of 11 parameters" in capsys.readouterr().out
    assert _train(tmp_path / "other", *arguments, "--config.model.decoder.mlp=96") == 1
    assert "layers/mlp/" in capsys.readouterr().err
