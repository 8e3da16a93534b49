"""One finished run for all tests of commands; it is only read."""

import pytest

from tests.end_to_end.commands import ROOT, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of 12 steps: the schedule's length is 12."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert train(workdir, "--config.loop.steps=12") == 0
    return workdir
