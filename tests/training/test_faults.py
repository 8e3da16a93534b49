"""Whatever happens to one process, every process ends soon and says why in one line.

All scenarios run side by side as child processes (faults_worker.py) in one fixture; each test reads one outcome.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from t5x_like.core.errors import UserError
from t5x_like.training.faults import Faults
from tests.training.faults_worker import CONFIG
from tests.training.metadata_server import Metadata

ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("faults_worker.py")
START_SECONDS = 90.0  # until the first steps; a busy machine takes long to import jax
SILENCE = CONFIG.heartbeat_seconds / 3


@dataclasses.dataclass
class Outcome:
    """How the processes of a scenario ended; seconds count from the moment of the fault."""

    statuses: list[int]
    seconds: list[float]
    stderr: list[str]
    logs: list[str]
    steps: list[list[str]]

    def lines(self, process: int) -> list[str]:
        return [line for line in self.stderr[process].splitlines() if line.startswith("t5x_like: ")]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What the processes do, and what is done to one of them once its steps file says `when` (or step 15).

    notice: the machine of the target has a metadata server, which then announces its end.
    """

    processes: int
    action: str = "none"
    signals: tuple[signal.Signals, ...] = ()
    target: int = 0
    when: str = "15"
    pause: float = 0.0  # seconds between two signals
    limit: float = 40.0  # seconds until all have to be gone
    notice: bool = False


SCENARIOS = {
    "kill 1": Scenario(2, signals=(signal.SIGKILL,), target=1),
    "kill 0": Scenario(2, signals=(signal.SIGKILL,), target=0),
    "stop 1": Scenario(2, signals=(signal.SIGSTOP,), target=1),
    "stop 0": Scenario(2, signals=(signal.SIGSTOP,), target=0),
    "raise 0": Scenario(2, action="raise:0", when="20"),
    "raise 1": Scenario(2, action="raise:1", when="20"),
    "stall": Scenario(2, action="stall", when="20"),
    "preempt": Scenario(2, signals=(signal.SIGTERM,), target=1),
    "notice": Scenario(2, target=1, notice=True),
    "alone: notice": Scenario(1, action="slow_save", notice=True, signals=(signal.SIGTERM,) * 2, pause=1.0),
    "alone: stall": Scenario(1, action="stall:0", when="20"),
    "preempt in compile": Scenario(2, action="compile", signals=(signal.SIGTERM,), target=1, when="compiling"),
    "alone: twice": Scenario(1, action="slow_save", signals=(signal.SIGTERM, signal.SIGTERM), pause=1.0),
    "alone: suspended": Scenario(
        1, action="short", signals=(signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM), pause=4.0, limit=60
    ),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def play(scenario: Scenario, folder: pathlib.Path) -> Outcome:
    with contextlib.ExitStack() as stack:
        metadata = stack.enter_context(contextlib.closing(Metadata())) if scenario.notice else None
        return _play(scenario, folder, metadata)


def _play(scenario: Scenario, folder: pathlib.Path, metadata: Metadata | None) -> Outcome:
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"
    logs = [folder / f"{index}.txt" for index in range(scenario.processes)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    children = []
    for index, log in enumerate(logs):
        command = [sys.executable, WORKER, str(index), str(scenario.processes), address, str(log), scenario.action]
        with open(folder / f"{index}.err", "w") as stderr:
            own = {"GCE_METADATA_HOST": metadata.address} if metadata and index == scenario.target else {}
            child = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, env=environment | own)
        children.append(child)
    try:
        _wait(lambda: all(scenario.when in _steps(log) for log in logs), children, START_SECONDS)
        begun = time.monotonic()
        if metadata:
            _wait(lambda: len(metadata.asked) >= 3, children, 20)  # the second look: the first was answered
            metadata.values["preempted"] = "TRUE"
            _wait(lambda: any(set(_steps(log)) & {"saving", "saved"} for log in logs), children, 20)
        for number, sent in enumerate(scenario.signals):
            time.sleep(scenario.pause if number else 0)
            children[scenario.target].send_signal(sent)
        seconds = [0.0] * len(children)
        watched = [
            i for i in range(len(children)) if scenario.signals[-1:] != (signal.SIGSTOP,) or i != scenario.target
        ]
        for index in watched:
            children[index].wait(max(1.0, begun + scenario.limit - time.monotonic()))
            seconds[index] = time.monotonic() - begun
    finally:
        for child in children:
            child.kill()
            child.wait()
    return Outcome(
        statuses=[child.returncode for child in children],
        seconds=seconds,
        stderr=[(folder / f"{index}.err").read_text() for index in range(len(children))],
        logs=[log.read_text() if log.exists() else "" for log in logs],
        steps=[_steps(log) for log in logs],
    )


def _steps(log: pathlib.Path) -> list[str]:
    path = pathlib.Path(f"{log}.steps")
    return path.read_text().split() if path.exists() else []


def _wait(condition, children, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            if condition():
                return
            raise AssertionError(f"the children did not get going: {[child.poll() for child in children]}")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("faults")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = {name: pool.submit(play, scenario, folder / name) for name, scenario in SCENARIOS.items()}
        return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_killed_or_stopped_peer_is_named_within_the_limit(outcomes, how):
    outcome = outcomes[f"{how} 1"]
    assert outcome.statuses[0] == 1
    (line,) = outcome.lines(0)
    assert line.startswith(f"t5x_like: process 1 has given no heartbeat for {SILENCE:.1f} s")
    assert outcome.seconds[0] < CONFIG.heartbeat_seconds, "ours speaks before jax's limit"
    assert "Check failure stack trace" not in outcome.stderr[0]


def test_a_stopped_coordinator_is_named_within_the_limit(outcomes):
    outcome = outcomes["stop 0"]
    assert outcome.statuses[1] == 1
    (line,) = outcome.lines(1)
    assert "the coordinator 127.0.0.1:" in line and f"(process 0) has not answered for {SILENCE:.1f} s" in line
    assert outcome.seconds[1] < CONFIG.heartbeat_seconds


def test_a_killed_coordinator_is_named_although_jax_aborts_at_once(outcomes):
    outcome = outcomes["kill 0"]
    assert outcome.statuses == [-signal.SIGKILL, 1]
    (line,) = outcome.lines(1)
    assert line.startswith("t5x_like: process 1: process 0, which runs the coordinator 127.0.0.1:")
    assert outcome.seconds[1] < CONFIG.heartbeat_seconds
    assert line.removeprefix("t5x_like: ") in outcome.logs[1]


@pytest.mark.parametrize("index", [0, 1])
def test_an_exception_on_one_process_ends_both_with_its_message(outcomes, index):
    outcome, other = outcomes[f"raise {index}"], 1 - index
    assert outcome.statuses == [1, 1]
    assert outcome.lines(index) == [f"t5x_like: process {index} failed: ValueError: boom"]
    (line,) = outcome.lines(other)
    assert line == f"t5x_like: process {index} failed: ValueError: boom (process {other} ends with it)"
    assert max(outcome.seconds) < SILENCE + 3
    assert 'raise ValueError("boom")' in outcome.logs[index], "the traceback is in the log"


def test_a_stalled_process_ends_both_at_the_limit_of_the_phase(outcomes):
    outcome = outcomes["stall"]
    assert outcome.statuses == [1, 1]
    for index in range(2):
        (line,) = outcome.lines(index)
        assert "no progress in phase 'step' for 4 s (config.runtime.phase_seconds.step), step 20" in line
    assert max(outcome.seconds) < 4 + CONFIG.heartbeat_seconds
    assert any("in act" in log for log in outcome.logs), "the stacks show where it stalled"
    assert "in act" in outcome.stderr[1], "on the terminal too, which may be all that is kept"


def test_a_stalled_single_process_ends_with_its_stacks_in_the_log_and_on_stderr(outcomes):
    outcome = outcomes["alone: stall"]
    assert outcome.statuses == [1]
    (line,) = outcome.lines(0)
    assert line == "t5x_like: no progress in phase 'step' for 4 s (config.runtime.phase_seconds.step), step 20"
    assert "in act" in outcome.logs[0] and "in act" in outcome.stderr[0]
    assert 3 < outcome.seconds[0] < 12


def test_a_notice_to_the_machine_of_one_of_two_saves_both_at_the_same_step(outcomes):
    outcome = outcomes["notice"]
    assert outcome.statuses == [75, 75], outcome.stderr
    assert outcome.steps[0][-1] == outcome.steps[1][-1] == "saved"
    assert outcome.steps[0][-2] == outcome.steps[1][-2]
    assert outcome.lines(0) == []
    (line,) = outcome.lines(1)
    assert line.startswith("t5x_like: process 1: preempted TRUE of the metadata server: saves after this step and ends")


def test_the_signal_that_follows_a_notice_is_not_a_second_one(outcomes):
    """The machine asks by SIGTERM when it stops, while the run saves: only another SIGTERM ends it."""
    outcome = outcomes["alone: notice"]
    assert outcome.statuses == [1] and outcome.steps[0][-1] == "saving"
    notice, asked, ended = outcome.lines(0)
    assert "preempted TRUE of the metadata server: saves after this step and ends" in notice
    assert "SIGTERM: saves after this step and ends; a second signal ends at once" in asked
    assert ended == "t5x_like: second signal (SIGTERM): ends at once, without saving"


def test_sigterm_to_one_of_two_saves_both_at_the_same_step(outcomes):
    outcome = outcomes["preempt"]
    assert outcome.statuses == [75, 75]
    assert outcome.steps[0][-1] == outcome.steps[1][-1] == "saved"
    assert outcome.steps[0][-2] == outcome.steps[1][-2]
    assert outcome.lines(1) == [
        "t5x_like: process 1: SIGTERM: saves after this step and ends; a second signal ends at once"
    ]


def test_sigterm_during_compilation_ends_both_without_saving(outcomes):
    outcome = outcomes["preempt in compile"]
    assert outcome.statuses == [75, 75]
    assert outcome.steps == [["compiling"], ["compiling"]]
    assert "stopped by SIGTERM in phase compile: nothing to save, start again" in outcome.lines(0)[0]
    assert max(outcome.seconds) < SILENCE + 3


def test_a_second_signal_ends_at_once(outcomes):
    outcome = outcomes["alone: twice"]
    assert outcome.statuses == [1]
    assert outcome.steps[0][-1] == "saving"
    assert outcome.lines(0)[-1] == "t5x_like: second signal (SIGTERM): ends at once, without saving"
    assert outcome.seconds[0] < 5


def test_a_suspended_single_process_does_not_age(outcomes):
    outcome = outcomes["alone: suspended"]
    assert outcome.statuses == [75], outcome.stderr
    assert outcome.steps[0][-1] == "saved"


# In this process.


def test_the_loop_pays_less_than_20_microseconds_a_step(tmp_path):
    with Faults(CONFIG, log_path=str(tmp_path / "log.txt")) as faults:
        timings = []
        for _ in range(5):
            begun = time.perf_counter()
            for step in range(2000):
                faults.enter("step")
                assert not faults.should_stop(step)
            timings.append((time.perf_counter() - begun) / 2000)
    assert min(timings) < 20e-6


@pytest.fixture
def terminal():
    """SIGHUP as a terminal has it: whoever runs the tests under nohup ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
def test_signal_handlers_are_put_back():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with Faults(CONFIG, log_path=None):
        during = [signal.getsignal(number) for number in numbers]
        assert all(one != two for one, two in zip(before, during, strict=True))
    assert [signal.getsignal(number) for number in numbers] == before


def test_nohup_keeps_a_run_from_the_end_of_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Faults(CONFIG, log_path=None) as faults:
            faults.enter("step")
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.6)  # the monitor has looked twice
            assert not faults.should_stop(1) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("names", "ends_at"),
    [
        (["SIGHUP", "SIGHUP", "SIGUSR1"], None),
        (["SIGUSR1", "SIGTERM"], None),
        (["SIGUSR1", "SIGTERM", "SIGTERM"], 2),
        (["SIGTERM", "SIGHUP"], None),
        (["SIGINT", "SIGTERM"], 1),
        (["preempted TRUE of the metadata server", "SIGUSR1", "SIGTERM", "SIGTERM"], 3),
    ],
)
def test_a_warning_is_not_the_signal_that_ends_at_once(monkeypatch, names, ends_at):
    """A shell and the kernel both say that a terminal is closed; Slurm warns, and sends SIGTERM while the run saves."""
    ended = []
    monkeypatch.setattr(Faults, "_end", lambda self, line, status=1: ended.append(line))
    with Faults(CONFIG, log_path=None) as faults:
        faults.enter("save")
        for index, name in enumerate(names):
            assert not ended
            faults._on_signal(name)
            assert bool(ended) == (index == ends_at) and faults.should_stop(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.usefixtures("terminal")
def test_a_signal_to_a_single_process_stops_it_within_the_step(number):
    with Faults(CONFIG, log_path=None) as faults:
        faults.enter("step")
        assert not faults.should_stop(1)
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not faults.should_stop(2) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert faults.should_stop(2)


def test_an_exception_in_a_run_of_one_passes_and_its_traceback_is_logged(tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(UserError, match="no such file"), Faults(CONFIG, log_path=str(log)):
        raise UserError("no such file")
    assert "Traceback" in log.read_text()


def test_an_inner_phase_restarts_the_outer_one():
    with Faults(CONFIG, log_path=None) as faults:
        faults.enter("step")
        with faults.phase("evaluate"):
            assert faults._state.phase[0] == "evaluate"
        assert faults._state.phase[0] == "step"


def test_a_guarded_exception_passes_in_a_run_of_one():
    with pytest.raises(ValueError, match="boom"), Faults(CONFIG, log_path=None) as faults, faults.guard():
        raise ValueError("boom")


def test_an_unknown_phase_is_refused():
    with Faults(CONFIG, log_path=None) as faults, pytest.raises(ValueError, match="'stpe' should be one of start"):
        faults.enter("stpe")
