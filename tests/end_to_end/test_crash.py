"""A run that is killed at random moments, also while it writes a checkpoint, ends as if nothing had happened.

tools/crash_test.py does the work, in child processes; by hand it takes 20 kills. Here: 5, and one SIGTERM.
"""

import json
import re

import pytest

from tools import crash_test


def test_a_killed_run_is_bit_identical_to_an_undisturbed_one(capsys, tmp_path):
    status = crash_test.main(["--kills=5", "--stops=1", "--seed=1", f"--folder={tmp_path}"])
    output = capsys.readouterr().out
    assert status == 0, output
    inside = re.search(r"6 interruptions, (\d+) of them inside the writing of a checkpoint", output)
    assert inside and int(inside.group(1)) >= 1, output
    assert re.search(r"SIGTERM +stepping +(\d+) +\1 +75", output), output


# What the comparison above would say if there were something to find.


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0000001}], "row 2: train/loss is 1.0000001"),
        ([{"step": 1, "train/loss": 2.0}], "row 2: train/loss is missing"),
        ([{"step": step, "train/loss": float(3 - step)} for step in (1, 2, 3)], "row 3: train/loss is too much"),
        ([{"step": step, "train/loss": float(3 - step)} for step in (1, 2, 2)], "row 2: train/loss is written 2 times"),
    ],
)
def test_a_different_row_is_found(tmp_path, rows, problem):
    whole = write(tmp_path / "a", {"step": 1, "train/loss": 2.0, "time": 1}, {"step": 2, "train/loss": 1.0, "time": 2})
    same = write(tmp_path / "b", {"step": 1, "train/loss": 2.0, "time": 5}, {"step": 2, "train/loss": 1.0, "time": 7})
    assert crash_test.compare_rows(whole, same) == []
    problems = crash_test.compare_rows(whole, write(tmp_path / "c", *rows))
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_one_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    import jax.numpy as jnp
    import numpy as np

    from t5x_like.storage.checkpoint import Checkpoints

    weights = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    flipped = weights.copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    for name, values in (("a", weights), ("b", weights), ("c", flipped)):
        with Checkpoints(str(tmp_path / name)) as checkpoints:
            optimizer = {"m": jnp.ones((2, 3), jnp.bfloat16)}
            checkpoints.save(3, {"params": {"w": jnp.asarray(values)}, "optimizer": optimizer}, {})
    assert crash_test.compare_checkpoints(tmp_path / "a", tmp_path / "b") == []
    assert crash_test.compare_checkpoints(tmp_path / "a", tmp_path / "c") == ["params/w differs"]
