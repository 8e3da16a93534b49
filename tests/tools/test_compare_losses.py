"""tools/compare_losses on two workdirs: what is equal, what differs and where, and what is no workdir."""

import json
import math
import pathlib

import pytest

from tools import compare_losses

LOSSES = (2.5, 2.25, 2.125)


def workdir(path, losses=LOSSES):
    path.mkdir()
    rows = [{"step": step, "train/loss": loss, "train/grad_norm": 1.0} for step, loss in enumerate(losses, 1)]
    rows.append({"step": len(losses), "eval/validation/loss": 3.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("losses", "arguments", "status", "last"),
    [
        (LOSSES, [], 0, "3 rows, largest relative difference 0, allowed 0"),
        ((2.5, 2.2500001, 2.0), [], 1, "step 2 is the first that differs"),
        ((2.5, 2.2500001, 2.125), ["--tolerance=1e-6"], 0, "allowed 1e-06"),
        ((2.5, 2.25, "NaN"), [], 1, "difference inf, allowed 0; step 3 is the first that differs"),
        ((2.5, 2.25), [], 1, "rows for other steps: 3 and 2 rows, 2 in common"),
    ],
)
def test_the_first_step_that_differs_is_named(tmp_path, capsys, losses, arguments, status, last):
    runs = [workdir(tmp_path / "a"), workdir(tmp_path / "b", losses)]
    assert compare_losses.main([*runs, *arguments]) == status
    assert last in capsys.readouterr().out.splitlines()[-1]


def test_another_gradient_differs_too_and_nan_equals_nan(tmp_path):
    one = {1: {"train/loss": math.nan, "train/grad_norm": 1.0}}
    assert compare_losses.compare(one, {1: {**one[1]}}, 0.0) == 0
    assert compare_losses.compare(one, {1: {**one[1], "train/grad_norm": 1.5}}, 0.1) == 1


@pytest.mark.parametrize(
    ("other", "message"), [(["nowhere"], "nowhere/metrics.jsonl: no such file"), ([], "give either")]
)
def test_wrong_use_exits_2(tmp_path, capsys, other, message):
    with pytest.raises(SystemExit) as ended:
        compare_losses.main([workdir(tmp_path / "a"), *other])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and message in captured.err.splitlines()[-1] and captured.out == ""
    assert not other or captured.err.count("\n") == 1


def test_overrides_reach_the_config_of_both_runs(tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(list(map(str, command)))
        if "train" in command:
            folder = next(word.partition("=")[2] for word in command if word.startswith("--workdir="))
            workdir(pathlib.Path(folder))

    monkeypatch.setattr(compare_losses.subprocess, "run", run)
    overrides = ["--override=optim.schedule.warmup_steps=5", "--override=data.batch_size=4"]
    assert compare_losses.main(["--base=HEAD", "--config=configs/pretrain/small.py:/texts", *overrides]) == 0
    trained = [command for command in commands if "train" in command]
    assert len(trained) == 2
    for command in trained:
        assert "--config=configs/pretrain/small.py:/texts" in command
        assert command[-2:] == ["--config.optim.schedule.warmup_steps=5", "--config.data.batch_size=4"]
