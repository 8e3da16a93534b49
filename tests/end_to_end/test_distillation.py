"""A run of two models by its config, as a user starts it: a student of a teacher that a run or a folder holds."""

import json
import pathlib
import shutil
from typing import Any

import pytest

from configs.distill import test as student_config
from configs.pretrain import test as plain_config
from t5x_like.__main__ import main
from t5x_like.convert import convert
from t5x_like.core.errors import UsageError
from t5x_like.runs import train as experiments
from t5x_like.storage.model_directory import read_metadata

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAST = "--config.optim.schedule.warmup_steps=0"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def _rows(workdir: pathlib.Path) -> list[tuple]:
    kept = ("train/loss", "train/divergence", "train/grad_norm", "eval/validation/teacher_agreement")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], *(row.get(name) for name in kept)) for row in rows]


def _distill(workdir: pathlib.Path, teacher: pathlib.Path, *arguments: str) -> int:
    fixed = [f"--config=configs/distill/test.py:{teacher}", f"--workdir={workdir}", FAST]
    return main(["train", *fixed, "--config.optim.schedule.steps=6", *arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs: a teacher of 4 steps and its student of 6."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        fixed = ["--config=configs/pretrain/test.py", f"--workdir={folder / 'teacher'}", FAST]
        assert main(["train", *fixed, "--config.loop.steps=4"]) == 0
        assert _distill(folder / "student", folder / "teacher", "--config.loop.steps=6") == 0
    return folder


def test_a_student_learns_from_its_teacher_and_its_checkpoint_holds_the_student_alone(runs):
    rows = _rows(runs / "student")
    divergences = [divergence for _, _, divergence, _, _ in rows if divergence is not None]
    assert len(divergences) == 6 and divergences[-1] < 0.9 * divergences[0]
    assert 0 <= rows[-1][-1] <= 1, "the agreement with the teacher on held-out text"
    note = read_metadata(str(runs / "student/checkpoints/6"))
    assert set(note["arrays"]) == {"params", "optimizer", "state"}
    assert note["arrays"]["params"]["layers/mlp/up"]["shape"] == [1, 16, 32]
    assert note["roles"]["teacher"]["source"] == str(runs / "teacher/checkpoints/4")
    assert main(["generate", str(runs / "student"), "--prompt=To be", "--max_new_tokens=4"]) == 0


def test_a_resume_is_exact_with_the_same_teacher_wherever_it_lies_now(runs, tmp_path, capsys):
    teacher = shutil.copytree(runs / "teacher", tmp_path / "teacher")
    assert _distill(tmp_path / "run", teacher, "--config.loop.steps=3") == 0
    again = ["train", f"--workdir={tmp_path / 'run'}", "--config.loop.steps=6"]
    teacher.rename(tmp_path / "moved")
    assert main(again) == 1
    assert f"config.roles.teacher.source: {teacher} is no model directory" in capsys.readouterr().err
    assert main([*again, f"--config.roles.teacher.source={runs / 'student'}"]) == 1
    assert "config.roles.teacher: " in (line := capsys.readouterr().err.splitlines()[-1]) and "other parameters" in line
    assert main([*again, f"--config.roles.teacher.source={tmp_path / 'moved'}"]) == 0
    whole = {step: row for step, *row in _rows(runs / "student") if row[0] is not None}
    assert {step: row for step, *row in _rows(tmp_path / "run") if row[0] is not None} == whole


def test_a_teacher_in_a_hugging_face_folder_teaches_the_same(runs, tmp_path):
    convert.to_huggingface(str(runs / "teacher"), str(tmp_path / "folder"))
    assert _distill(tmp_path / "run", tmp_path / "folder", "--config.loop.steps=1") == 0
    (first, *_), (reference, *_) = _rows(tmp_path / "run"), _rows(runs / "student")
    assert first[:4] == reference[:4] and None not in first[:4]


def test_a_teacher_is_found_by_a_pattern_that_matches_one(runs, tmp_path, capsys):
    steps = "--config.loop.steps=1"
    assert _distill(tmp_path / "run", runs / "teach*", steps) == 0
    (first, *_), (reference, *_) = _rows(tmp_path / "run"), _rows(runs / "student")
    assert first[:4] == reference[:4]
    capsys.readouterr()
    assert _distill(tmp_path / "other", runs / "{teacher,student}", steps) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.roles.teacher.source: " in line and f"matches 2 paths ({runs}/student, {runs}/teacher)" in line


def test_roles_are_those_that_the_objective_reads():
    config: Any = student_config.get_config()
    config.roles = {}
    with pytest.raises(UsageError, match="name='distill' reads a model as 'teacher'; give config.roles.teacher with"):
        experiments.from_config(config)
    config = plain_config.get_config()
    config.roles = {"teacher": {"source": "x", "rules": "", "dtype": "stored"}}
    with pytest.raises(UsageError, match="config.roles.teacher has no effect: .* reads no model but the policy"):
        experiments.from_config(config)
    config = student_config.get_config("")
    with pytest.raises(UsageError, match="config.roles.teacher.source is empty; name a workdir"):
        experiments.from_config(config)


BAD = {
    "rows longer than the teacher's": (["--config.data.length=256", "--config.model.max_length=256"], "at most 128"),
    "a rule that changes nothing": (["--config.roles.teacher.rules=mlp=tensor"], "config.roles.teacher.rules entry"),
    "a type that is none": (["--config.roles.teacher.dtype=int3"], "dtype='int3' should be 'stored' or one of"),
    "a role that is none": (["--config.roles.judge.source=x"], "config.roles.judge is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_roles_are_one_line(case, runs, tmp_path, capsys):
    arguments, part = BAD[case]
    assert _distill(tmp_path / "run", runs / "teacher", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("t5x_like: ") and part in line
