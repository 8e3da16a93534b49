"""The commands as a user calls them, in process: train, stop, resume, generate, inspect. Bad input: test_bad_input.py.

All runs are on 8 fake devices with the smallest config; one workdir with a finished run is shared and only read.
"""

import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.data.read.loader import open_data
from t5x_like.data.tokenizers import tokenizer_training
from t5x_like.runs import train as experiments
from t5x_like.runs import training_run
from t5x_like.storage import model_directory, workdir
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.training.faults import PREEMPTED
from tests.data import corpus
from tests.end_to_end.commands import ROOT, rows, train, unfinished, values


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_workdir_holds_all_that_a_run_leaves(finished):
    for name in ("config.json", "overrides.json", "manifest.json", "metrics.jsonl", "log.txt", "tokenizer"):
        assert (finished / name).exists(), name
    assert json.loads((finished / "overrides.json").read_text()) == {"loop.steps": 12}
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert steps == [10, 12]
    written = rows(finished)
    assert [row["step"] for row in written if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in written if "eval/validation/loss" in row] == [10, 12]
    last = written[-1]
    assert {"eval/validation/bits_per_byte", "eval/validation/perplexity", "eval/validation/accuracy"} <= last.keys()
    # Bytes are tokens here, so bits per byte are the loss in other units (the end of text is no byte).
    assert last["eval/validation/bits_per_byte"] == pytest.approx(last["eval/validation/loss"] / 0.6931, rel=0.01)


def test_the_loss_falls(finished):
    losses = [row["train/loss"] for row in rows(finished) if "train/loss" in row]
    assert losses[0] == pytest.approx(5.55, abs=0.1) and losses[-1] < 4.5


def test_a_finished_run_says_so_and_exits_0(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train(finished, config=None) == 0
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
    assert train(workdir, config=None) == 0
    captured = capsys.readouterr()
    assert f"was finished at step 12, but the checkpoint of that step {damage}" in captured.err
    assert "is finished" not in captured.out
    assert values(workdir) == values(finished) and last.is_dir()
    assert train(workdir, config=None) == 0
    assert "is finished: 12 of 12 steps" in capsys.readouterr().out


def test_a_stopped_and_resumed_run_has_the_rows_of_an_undisturbed_one(finished, tmp_path):
    workdir = unfinished(finished, tmp_path)
    assert train(workdir, config=None) == 0
    assert values(workdir) == values(finished)
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
        assert train(workdir, "--config.loop.steps=12", *chosen) == PREEMPTED

    def judged():
        return Checkpoints(str(workdir / "checkpoints"), read_only=True).metrics(10)

    assert judged() == {} and (workdir / "checkpoints" / "10").is_dir()
    assert train(workdir, config=None) == 0
    assert values(workdir) == values(finished)
    (row,) = [row for row in rows(workdir) if row["step"] == 10 and "eval/validation/loss" in row]
    assert judged()["eval/validation/loss"] == row["eval/validation/loss"]


def test_a_resume_may_change_mesh_and_length_and_reads_the_same_batches(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    # Fields of which the stored config holds None too.
    fields = ("--config.mesh.preset=fsdp_tensor", "--config.mesh.tensor=2", "--config.checkpoint.keep_every=7")
    assert train(workdir, "--config.loop.steps=14", *fields, config=None) == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["loop"]["steps"] == 14 and config["optim"]["schedule"]["steps"] == 12
    assert config["mesh"]["tensor"] == 2 and config["checkpoint"]["keep_every"] == 7
    assert values(workdir)[: len(values(finished))] == values(finished)
    assert [row["step"] for row in rows(workdir) if "train/loss" in row] == list(range(1, 15))


def test_a_resume_on_another_mesh_stays_within_a_small_tolerance(finished, tmp_path):
    workdir = unfinished(finished, tmp_path)
    assert train(workdir, "--config.mesh.preset=fsdp_tensor_sequence", config=None) == 0
    rows = list(zip(values(finished), values(workdir), strict=True))
    assert [one[0] for one, two in rows if one != two][0] > 10, "after the resume it computes in another order"
    for one, two in rows:
        assert [value for value in two if value is not None] == pytest.approx(
            [value for value in one if value is not None], rel=1e-5
        )


def test_micro_batches_give_the_losses_of_whole_batches(finished, tmp_path):
    arguments = ("--config.loop.steps=12", "--config.loop.micro_batches=2", "--config.mesh.preset=fsdp_tensor")
    assert train(tmp_path / "run", *arguments) == 0
    for one, two in zip(values(finished), values(tmp_path / "run"), strict=True):
        assert [value for value in two if value is not None] == pytest.approx(
            [value for value in one if value is not None], rel=2e-5
        )


def test_check_builds_everything_prints_the_summary_and_writes_nothing(tmp_path, capsys):
    cache = tmp_path / "cache"
    assert train(tmp_path / "run", "--check", f"--config.data.cache={cache}") == 0
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


def test_a_tokenizer_that_a_kill_left_half_written_is_written_again(finished, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "tokenizer").mkdir(parents=True)  # a first start that got no further
    cache = f"--config.data.cache={finished / 'cache'}"
    assert train(workdir, cache, "--config.loop.steps=1", "--config.optim.schedule.warmup_steps=0") == 0
    assert (workdir / "tokenizer" / "vocabulary.json").read_bytes() == (
        finished / "tokenizer" / "vocabulary.json"
    ).read_bytes()


def test_a_warm_start_takes_the_chosen_parameters(finished, tmp_path, capsys):
    arguments = [
        f"--config.checkpoint.init_from={finished}",
        "--config.loop.steps=1",
        "--config.optim.schedule.warmup_steps=0",
    ]
    assert train(tmp_path / "all", *arguments) == 0
    first = rows(tmp_path / "all")[0]["train/loss"]
    assert first < 4.5 < rows(finished)[0]["train/loss"]
    assert train(tmp_path / "some", *arguments, "--config.checkpoint.init_select=('embed/.*',)") == 0
    assert "1 of 11 parameters" in capsys.readouterr().out
    assert train(tmp_path / "other", *arguments, "--config.model.decoder.mlp=96") == 1
    assert "layers/mlp/" in capsys.readouterr().err


def test_a_resume_finds_its_text_elsewhere_and_does_not_ask_for_its_tokenizer(tmp_path, capsys):
    text, tokenizer = tmp_path / "a.txt", tmp_path / "tokenizer"
    text.write_text("to be, or not to be, that is the question\n" * 200)
    tokenizer_training.train("bpe", 270, [text.read_text()]).save(str(tokenizer))
    given = [f"--config.data.source=text:{text}", "--config.data.validation=", f"--config.data.tokenizer={tokenizer}"]
    given += ["--config.model.vocab_size=270", f"--config.data.cache={tmp_path / 'cache'}"]
    assert train(tmp_path / "run", *given, "--config.loop.steps=4") == 0
    shutil.rmtree(tokenizer)
    shutil.rmtree(tmp_path / "cache")
    assert train(tmp_path / "run", "--config.loop.steps=5", config=None) == 0
    text.rename(tmp_path / "b.txt")
    shutil.rmtree(tmp_path / "cache")
    assert train(tmp_path / "run", "--config.loop.steps=6", config=None) == 1
    assert "a.txt: no such file" in capsys.readouterr().err
    moved = f"--config.data.source=text:{tmp_path / 'b.txt'}"
    assert train(tmp_path / "run", moved, "--config.loop.steps=6", config=None) == 0
    assert "config.data.source: 'text:" in capsys.readouterr().out
    starts = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert len({start["data"] for start in starts}) == 1 and len(starts) == 3
    other = f"--config.data.tokenizer={tmp_path / 'none'}"  # another one is named: it must be there
    assert train(tmp_path / "run", other, "--config.loop.steps=7", config=None) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_a_resume_finds_moved_text_with_a_cache_that_may_not_be_written(tmp_path, monkeypatch, capsys):
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("to be, or not to be, that is the question\n" * 200)
    given = [f"--config.data.source=text:{text}", "--config.data.validation=0.1", f"--config.data.cache={cache}"]
    assert train(tmp_path / "run", *given, "--config.loop.steps=4") == 0
    corpus.make_read_only(monkeypatch, cache)
    text.rename(tmp_path / "b.txt")
    moved = f"--config.data.source=text:{tmp_path}/b.*"
    assert train(tmp_path / "run", moved, "--config.loop.steps=5", config=None) == 0
    (tmp_path / "b.txt").unlink()  # what is known of it lies in the workdir now
    assert train(tmp_path / "run", "--config.loop.steps=6", config=None) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--step=6"]) == 0
    assert f"{tmp_path}/b.txt" in capsys.readouterr().out


def test_a_run_on_the_text_that_comes_with_the_program_goes_on_when_that_moved(tmp_path):
    """An installation stands in the config by its full path: as of one that is gone now."""
    text = tmp_path / "old" / "configs" / "data" / "tinyshakespeare" / "input.txt"
    text.parent.mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "data" / "tinyshakespeare" / "input.txt", text)
    assert train(tmp_path / "run", f"--config.data.source=text:{text}", "--config.loop.steps=4") == 0
    shutil.rmtree(tmp_path / "old")
    shutil.rmtree(tmp_path / "run" / "cache")
    assert train(tmp_path / "run", "--config.loop.steps=5", config=None) == 0
    starts = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert len({start["data"] for start in starts}) == 1 and len(starts) == 2
