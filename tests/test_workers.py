"""The tables of tests/workers.py name files that are there, and every file belongs to one worker."""

import pathlib

from tests import workers

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_tables_name_files_that_are_there():
    named = [*workers.LONGEST, *(file for files in workers.GROUPS.values() for file in files)]
    assert len(set(named)) == len(named) > 20
    assert [file for file in named if not (ROOT / file).is_file()] == []


def test_a_group_is_that_of_a_whole_file():
    assert workers.group("tests/rl/test_rollout.py::test_x[a::b]") == "tests/rl/test_rollout.py"
    assert workers.group("tests/planner/test_plan.py::test_x") == "libtpu"
