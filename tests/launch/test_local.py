"""The command line of launch/local.py, which starts nothing here; what it starts is in tests/end_to_end."""

import shlex

import pytest

from launch import local


def test_a_dry_run_prints_the_command_of_each_process(capsys):
    assert local.main(["--processes=2", "--devices=4", "--dry_run", "--", "train", "--workdir=a b"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert {"JAX_PROCESS_ID=0", "JAX_NUM_PROCESSES=2", "JAX_NUM_CPU_DEVICES=4"} <= set(shlex.split(first))
    assert shlex.split(second)[-4:] == ["-m", "t5x_like", "train", "--workdir=a b"] and "JAX_PROCESS_ID=1" in second
    assert "nothing was started" in last


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--processes=2", "give the command after --"),
        ("--processes=0 -- train", "give at least one process"),
        ("--proceses=2 -- train", "there is no flag --proceses; did you mean '--processes'?"),
        ("--processes=two -- train", "invalid int value"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, says):
    assert local.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
