"""Fields and arguments that mean one path: below the home folder, by a pattern, with any characters in the name."""

import json
import pathlib
import shutil

import pytest

import t5x_like
from t5x_like.__main__ import main
from t5x_like.convert import convert, stored
from t5x_like.runs import branch
from tests.end_to_end.commands import ROOT, train, unfinished

ONE_STEP = ("--config.loop.steps=1", "--config.optim.schedule.warmup_steps=0")
NAME = "run {a,b} [1]"


@pytest.fixture(autouse=True)
def home(finished, tmp_path, monkeypatch):
    """The home folder, which holds a finished run with an odd name."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(finished, tmp_path / "runs" / NAME)
    return tmp_path


@pytest.mark.parametrize("given", [f"~/runs/{NAME}", f"~/runs/{NAME}/", "~/runs/run*", "~/{runs,none}/* [[]1]"])
def test_a_run_is_read_by_any_of_its_names(given, home, capsys):
    whole = str(home / "runs" / NAME)
    for command in (["inspect", given], ["inspect", given, "--step=3"]):
        assert main(command) == 0
        assert NAME in capsys.readouterr().out
    assert stored.open_model(given).directory == f"{whole}/checkpoints/12"
    assert t5x_like.load(given).generate("To", max_new_tokens=2, temperature=0.0)
    convert.to_huggingface(given, str(home / "folder"))
    convert.to_native(f"~/fold*{'/' * given.endswith('/')}", str(home / "back"))


@pytest.mark.parametrize("given", [f"~/runs/{NAME}/", "~/runs/run*"])
def test_a_run_begins_with_the_parameters_of_one(given, home):
    assert train(home / "new", *ONE_STEP, f"--config.checkpoint.init_from={given}") == 0
    assert json.loads((home / "new" / "config.json").read_text())["checkpoint"]["init_from"] == given


@pytest.mark.parametrize(("given", "at"), [(f"~/runs/{NAME}", ""), (f"~/runs/{NAME}/", "@10"), ("~/runs/run*", "@10")])
def test_a_run_branches_from_one_and_goes_on_when_that_is_gone(given, at, home, capsys):
    source = f"--config.checkpoint.branch_from={given}{at}"
    longer = [[f"--config.{field}={steps}" for field in ("loop.steps", "optim.schedule.steps")] for steps in (13, 14)]
    assert train(home / "new", *longer[0], source) == 0
    whole = f"{home}/runs/{NAME}{at or '@12'}"
    assert json.loads((home / "new" / "config.json").read_text())["checkpoint"]["branch_from"] == whole
    (home / "runs" / NAME).rename(home / "gone")
    assert train(home / "new", *longer[1], source) == 0
    assert train(home / "new", *longer[1], f"--config.checkpoint.branch_from={home}/gone") == 2
    assert "but the run in this --workdir branched from" in capsys.readouterr().err


def test_a_run_goes_on_by_a_pattern_of_its_workdir(finished, tmp_path):
    workdir = unfinished(finished, tmp_path / "other")
    assert train(pathlib.Path("~/oth*/r?n"), config=None) == 0
    assert (workdir / "checkpoints" / "12").exists()


def test_a_folder_with_a_step_in_its_name_is_itself_unless_there_is_one_of_that_step(home):
    run = home / "runs" / NAME
    shutil.copytree(run, home / "tail@10")
    assert branch.resolve("~/tail@10") == f"{home}/tail@10@12"
    assert branch.settled("~/tail@10", f"{home}/tail@10@12") == f"{home}/tail@10@12"
    shutil.copytree(run / "checkpoints" / "12", home / "one@10")
    text = branch.resolve("~/one@10")
    assert branch.checkpoint(text) == f"{home}/one@10"
    shutil.copytree(run, home / "one")  # the stored text means what it meant
    assert branch.checkpoint(text) == f"{home}/one@10"
    assert branch.resolve("~/one@10") == f"{home}/one@10" and branch.checkpoint(branch.resolve("~/one@10")) == (
        f"{home}/one/checkpoints/10"
    )


def test_configs_and_tokenizers_are_found_below_the_home_folder(home, capsys):
    shutil.copy(ROOT / "configs" / "pretrain" / "test.py", home / "mine.py")
    assert train(pathlib.Path("~/new"), "--check", config="~/m?ne.py") == 0
    shutil.copytree(home / "runs" / NAME / "tokenizer", home / "tokenizer [bytes]")
    for name in ("~/tokenizer [bytes]/", "~/token*"):
        assert train(home / "new", "--check", f"--config.data.tokenizer={name}") == 0
