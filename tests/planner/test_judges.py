"""Child processes within limits: small Python programs stand in for plans."""

import os
import signal
import subprocess
import sys
import textwrap
import time

from t5x_like.planner.search.judges import Judges, Task

MIB = 2**20
HOLD = "import time; held = bytearray({} * 2**20); time.sleep({})"


def judge(tmp_path, programs, *, jobs=2, memory=0, seconds=0.0):
    """{name: outcome}, in the order in which they ended."""
    waiting = [Task(n, (sys.executable, "-c", code), str(tmp_path / f"{n}.log")) for n, code in programs.items()]
    found = {}
    with Judges(jobs, memory=memory, seconds=seconds) as judges:
        judges.run(
            lambda: waiting.pop(0) if waiting else None, lambda task, outcome: found.update({task.name: outcome})
        )
    return found


def test_status_and_last_line_are_told(tmp_path):
    found = judge(tmp_path, {"good": "print('a'); print('b')", "bad": "raise SystemExit('too large')"})
    assert (found["good"].status, found["good"].said) == (0, "b")
    assert (found["bad"].status, found["bad"].said) == (1, "too large")


def test_two_run_at_once(tmp_path):
    found = judge(tmp_path, {"one": "import time; time.sleep(30)", "two": "print(1)"}, seconds=2.0)
    assert list(found) == ["two", "one"]
    assert found["one"].status is None and "more than 2.0 s to judge" in found["one"].said


def test_one_that_needs_more_memory_than_there_is_is_given_up_with_that_reason(tmp_path):
    found = judge(tmp_path, {"large": HOLD.format(300, 60), "small": "print(1)"}, memory=150 * MIB)
    assert found["large"].status is None and "needs more than 150 MiB" in found["large"].said
    assert found["small"].status == 0


def test_together_they_stay_within_the_limit_and_the_youngest_waits(tmp_path):
    begun = time.monotonic()
    found = judge(tmp_path, dict.fromkeys(("a", "b"), HOLD.format(120, 2)), memory=200 * MIB)
    assert [outcome.status for outcome in found.values()] == [0, 0]
    assert time.monotonic() - begun > 4.0, "one after the other"


def test_a_child_that_is_killed_is_a_reason(tmp_path):
    found = judge(tmp_path, {"victim": "import os; os.kill(os.getpid(), 9)"})
    assert found["victim"].said == "its judge was ended by SIGKILL, perhaps for want of memory"


def test_children_end_with_their_parent(tmp_path):
    code = f"""
    import sys
    from t5x_like.planner.search.judges import Judges, Task
    tasks = [Task("a", (sys.executable, "-c", "import time; time.sleep(60)"), {str(tmp_path / "a.log")!r})]
    judges = Judges(1, memory=0, seconds=0)
    begin = judges._start
    judges._start = lambda task: (child := begin(task), print(child.process.pid, flush=True))[0]
    judges.run(lambda: tasks.pop() if tasks else None, lambda *_: None)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert _alive(child)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
