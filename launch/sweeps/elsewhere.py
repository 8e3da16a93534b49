"""A sweep on a cluster: each member is a job of its own, which that cluster queues, restarts and ends.

From then on a member is known by its workdir, which must be readable from here. A member that fails for good on its
cluster is not noticed here: its rows stop, its logs are there, and --retry submits it again.
"""

import contextlib
import importlib
import io
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from launch.flags import Asked
from launch.job import Job
from launch.sweeps import outcomes
from launch.sweeps.index import DONE, SUBMITTED, WAITING, Entry, Index
from t5x_like.core.errors import UsageError, UserError

_POLL_SECONDS = 30.0

Launch = Callable[[Asked], int]
Say = Callable[[str], None]


def launcher(target: str) -> Launch:
    """What takes a job to its cluster, or prints what it would do."""
    return importlib.import_module(f"launch.{target}").launch


def rehearse(index: Index, jobs: Mapping[str, Job], launch: Launch) -> None:
    """Raises UserError, with the member, for a job that could not be submitted; submits nothing."""
    if any(job.gcloud.follow for job in jobs.values()):
        raise UsageError("--follow stays with one run; leave it out, or start each member by python -m launch.gcloud")
    for entry in index:
        with _naming(entry), contextlib.redirect_stdout(io.StringIO()):
            launch(Asked(jobs[entry.name], dry_run=True, check=False))


def say_ends(index: Index, jobs: Mapping[str, Job], names: Sequence[str], launch: Launch, *, say: Say) -> None:
    """Says the command that ends the last job of each of these members: on some clusters one that failed stays there
    for hours, and no other can have its name."""
    for name in names:
        shown = io.StringIO()
        with _naming(index[name]), contextlib.redirect_stdout(shown):
            launch(Asked(jobs[name], dry_run=True, check=False))
        for line in shown.getvalue().splitlines():
            if line.startswith("# stop"):
                say(f"{name}: where its last job is still there, end it first: {line.partition(': ')[2]}")


def submit(
    index: Index,
    jobs: Mapping[str, Job],
    names: Sequence[str],
    launch: Launch,
    *,
    at_once: int | None,
    say: Say,
) -> bool:
    """Submits those of `names` that wait; with `at_once`, so many at a time, while it watches their workdirs.

    Whether all were submitted: False if it was asked to stop before. What was submitted goes on by itself.
    """
    with _stop() as asked:
        while True:
            for entry in index:
                if entry.state != DONE and _is_done(index, entry):
                    index.change(entry.name, state=DONE)
                    say(f"{entry.name} is done ({_counts(index)})")
            waiting = [index[name] for name in names if index[name].state not in (SUBMITTED, DONE)]
            active = sum(entry.state == SUBMITTED for entry in index)
            room = len(waiting) if at_once is None else max(0, at_once - active)
            for entry in waiting[:room]:
                if asked():
                    return False
                # Noted first: what was submitted twice would write into one workdir.
                index.change(entry.name, state=SUBMITTED, starts=entry.starts + 1)
                try:
                    with _naming(entry):
                        launch(Asked(jobs[entry.name], dry_run=False, check=False))
                except UserError:
                    index.change(entry.name, state=WAITING)
                    raise
                say(f"{entry.name} is submitted ({_counts(index)})")
            if len(waiting) <= room:
                return True
            _sleep(_POLL_SECONDS, asked)
            if asked():
                return False


def _is_done(index: Index, entry: Entry) -> bool:
    """A workdir that cannot be read is none that is done: --results says more, and the others wait for their turn."""
    with contextlib.suppress(UserError):
        finished = outcomes.finished_step(index.workdir(entry.name))
        return finished is not None and finished >= entry.steps
    return False


def _counts(index: Index) -> str:
    done, submitted = (sum(entry.state == state for entry in index) for state in (DONE, SUBMITTED))
    return f"{done} of {len(index)} done, {submitted} submitted, {len(index) - done - submitted} waiting"


@contextlib.contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    """Puts the member before an error line."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{entry.member.described}: {error}") from None


@contextlib.contextmanager
def _stop() -> Iterator[Callable[[], bool]]:
    """Whether somebody asked to stop, which is not in the middle of a submission."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sleep(seconds: float, asked: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked():
        time.sleep(0.1)
