"""`python -m launch.sweep` whose members are quick_run's; it draws its plots only if it is asked to."""

import sys
from collections.abc import Sequence
from unittest import mock

from launch import sweep
from launch.job import Job
from launch.sweeps import plots

_PLAIN = Job.arguments.fget


def main(arguments: Sequence[str], *, draws: bool = False) -> int:
    quick = property(lambda job: ("-m", "tests.launch.quick_run", *_PLAIN(job)[2:]))
    drawn = plots.images if draws else lambda *_: {}
    with mock.patch.object(Job, "arguments", quick), mock.patch.object(plots, "images", drawn):
        return sweep.main([*arguments, "--no_check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
