"""Tasks and models that the tests of evaluation share; lm_eval is imported once for all of them."""

import functools

import pytest

from t5x_like.evaluation.harness import Tasks
from tests.evaluation import worlds


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """The four small tasks, loaded."""
    folder = tmp_path_factory.mktemp("tasks")
    worlds.write_tasks(folder)
    return Tasks(list(worlds.RECORDS), include=[str(folder)], data="")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Function from the name of a model to its folder."""

    @functools.cache
    def write(name):
        folder = tmp_path_factory.mktemp(name)
        worlds.write_model(name, folder)
        return folder

    return write


@pytest.fixture(scope="session")
def evaluated(tasks, folder_of):
    """Function from the name of a model to what is found about it on all four tasks."""

    @functools.cache
    def evaluate(name):
        return tasks.evaluate(worlds.ours(folder_of(name)), worlds.SETTINGS)

    return evaluate
