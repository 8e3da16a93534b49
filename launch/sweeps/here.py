"""A sweep on this machine: brings its members to their ends, N at once, with or without an early stop."""

import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from launch.job import Job
from launch.sweeps import halving, outcomes, results
from launch.sweeps.index import DONE, FAILED, RUNNING, SAVED, WAITING, Index
from launch.sweeps.pool import PREEMPTED, Ended, Pool, Task
from t5x_like.core.errors import UserError

# How a member ends that was asked to stop, or was ended at once: it goes on from its last checkpoint.
_STOPPED_BY_US = (PREEMPTED, -signal.SIGTERM, -signal.SIGKILL)
_IDLE_PREEMPTIONS = 5  # in a row, without a step of progress, after which a member counts as failed

Say = Callable[[str], None]


@dataclasses.dataclass
class Here:
    """What the runs of this machine share. jobs: by member. schedules: the length of each member's schedule, which an
    early stop leaves as it is. max_restarts: after faults."""

    index: Index
    jobs: Mapping[str, Job]
    schedules: Mapping[str, int]
    max_restarts: int
    say: Say

    def run(self, pool: Pool) -> None:
        """Brings all members to their ends, those that an early stop leaves where they are excepted."""
        index, left = self.index, self.index.names
        for steps in self._rungs():
            decided = {decision.steps: decision for decision in index.decisions}
            if steps not in decided:
                self._bring(left, steps, pool)
                if pool.asked:
                    return
                halved = index.settings.halving
                decided[steps] = self._decide(left, steps, halved[0] if halved else 1)
            left = [name for name in left if name in decided[steps].promoted]
        # Of those that are out of the race: what was retried and has not come to its end.
        retried = [entry.name for entry in index if entry.name not in left and entry.state in (WAITING, SAVED)]
        self._bring([*left, *retried], None, pool)

    def retry(self, names: Sequence[str], pool: Pool) -> None:
        """Brings these, failed before or stopped early, to the next decision if they are still compared; the others,
        and all where nothing is left to decide, to their ends."""
        decided = {decision.steps for decision in self.index.decisions}
        rung = next((steps for steps in self._rungs() if steps not in decided), None)
        compared = [name for name in names if all(name in decision.promoted for decision in self.index.decisions)]
        for name in names:
            self.index.change(name, state=WAITING, status=None, said="")
        self._bring(compared, rung, pool)
        self._bring([name for name in names if name not in compared], None, pool)

    def _rungs(self) -> list[int]:
        halved, first = self.index.settings.halving, self.index[self.index.names[0]]
        return halving.rungs(halved, len(self.index), first.steps) if halved else []

    def _decide(self, left: Sequence[str], steps: int, share: int) -> halving.Decision:
        index, settings = self.index, self.index.settings
        found = {name: outcomes.read(index.workdir(name)) for name in left}
        metric = results.metric_of(index, found, settings.metric)
        goal = settings.goal or results.goal_of(metric)
        values = {
            name: None if index[name].state == FAILED else outcome.at(metric, steps) for name, outcome in found.items()
        }
        decision = halving.decide(values, steps=steps, share=share, metric=metric, goal=goal)
        out = [name for name, _ in decision.ranking if name not in decision.promoted]
        index.decide(decision, [name for name in out if index[name].state not in (FAILED, DONE)])
        told = [_listed(decision.promoted, "goes on", "go on"), *([_listed(out, "stops", "stop")] if out else [])]
        first, *_, last = [_value(value) for _, value in (decision.ranking[0], *decision.ranking)]
        worst = f", worst {last}" if out else ""
        self.say(f"after {steps} steps, by {metric}: {'; '.join(told)} (best {first}{worst})")
        return decision

    def _bring(self, names: Sequence[str], rung: int | None, pool: Pool) -> None:
        """Runs what has not reached the rung, or its end."""
        tasks = []
        for name in names:
            entry = self.index[name]
            try:
                reached = outcomes.finished_step(self.index.workdir(name))
            except UserError as error:
                self.index.change(name, state=FAILED, said=str(error))
                continue
            if reached is not None and reached >= (rung or entry.steps):
                state = DONE if reached >= entry.steps else SAVED
                if entry.state != state:
                    self.index.change(name, state=state, status=None, said="")
            elif entry.state != FAILED:
                tasks.append(self._task(name, rung))
        again = _Again(self.max_restarts)

        def begins(task: Task) -> None:
            entry = self.index.change(task.name, state=RUNNING, starts=self.index[task.name].starts + 1)
            self.say(f"{entry.name} starts{f', to step {rung}' if rung else ''} ({self._counts(pool)})")

        def ends(task: Task, ended: Ended) -> bool:
            return self._ended(task, ended, rung, pool, again)

        pool.run(tasks, begins=begins, ends=ends)

    def _ended(self, task: Task, ended: Ended, rung: int | None, pool: Pool, again: "_Again") -> bool:
        """Notes how a start ended, says it, and whether to start again."""
        name, index = task.name, self.index
        seconds = index[name].seconds + ended.seconds
        outcome = outcomes.read(task.workdir)
        restart = not outcome.problem and not pool.asked and again(name, ended.status, outcome.step)
        state, said = FAILED, outcome.problem or ended.said
        if outcome.problem:
            pass
        elif ended.status == 0:
            state, said = SAVED if rung else DONE, ""
        elif (pool.asked and ended.status in _STOPPED_BY_US) or (restart and ended.status == PREEMPTED):
            state, said = SAVED, ""
        index.change(name, state=state, status=ended.status, seconds=seconds, said=said)
        metric = index.settings.metric or results.metric_of(index, {name: outcome}, "")
        value = f", {metric} {_value(outcome.last(metric))}" if outcome.last(metric) is not None else ""
        saved = f"is saved at step {outcome.step}" if ended.status >= 0 else "is ended, and goes on where it saved last"
        how = {DONE: "is done", SAVED: saved, FAILED: f"failed ({ended.status}): {said}"}
        more = "; it starts again" if restart else ""
        self.say(f"{name} {how[state]}{more}, {ended.seconds:.0f} s{value} ({self._counts(pool)})")
        return restart

    def _task(self, name: str, rung: int | None) -> Task:
        job = self.jobs[name]
        if rung:
            job = dataclasses.replace(job, config=to_rung(job.config, rung, self.schedules[name]))
        return Task(name, (sys.executable, *job.arguments), job.workdir, job.environment)

    def _counts(self, pool: Pool) -> str:
        done, failed = (sum(entry.state == state for entry in self.index) for state in (DONE, FAILED))
        return f"{done} of {len(self.index)} done, {f'{failed} failed, ' if failed else ''}{pool.running} running"


def to_rung(config: Sequence[str], rung: int, schedule: int) -> tuple[str, ...]:
    """The arguments of a run that ends at a rung, with the schedule of the whole run, which may go on from there."""
    changed = {"--config.loop.steps": rung, "--config.optim.schedule.steps": schedule}
    kept = [argument for argument in config if argument.partition("=")[0] not in changed]
    return (*kept, *(f"{name}={value}" for name, value in changed.items()))


class _Again:
    """Whether a run that ended is started again: always after a preemption, so many times after faults."""

    def __init__(self, max_restarts: int):
        self._max = max_restarts
        self._faults: dict[str, int] = {}
        self._idle: dict[str, tuple[int, int]] = {}

    def __call__(self, name: str, status: int, step: int) -> bool:
        if status in (0, 2):
            return False
        if status == PREEMPTED:
            before, count = self._idle.get(name, (-1, 0))
            self._idle[name] = step, (count + 1 if step == before else 1)
            return self._idle[name][1] < _IDLE_PREEMPTIONS
        self._faults[name] = self._faults.get(name, 0) + 1
        return self._faults[name] <= self._max


def _listed(names: Sequence[str], one: str, more: str) -> str:
    return f"{', '.join(names)} {one if len(names) == 1 else more}"


def _value(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
