"""How fast a run is: the clock of one start, the time that is lost outside of steps, and the rates of the steps.

All of it is of this process and this start, and exempt from bit equality (core/metrics.py:is_measurement).
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

# What a step is not: its time counts in the shares, not in the rates.
_OUTSIDE_STEPS = ("compile", "evaluate", "checkpoint")
_SHARES = ("input", *_OUTSIDE_STEPS)
# Parts of the input of reinforcement learning, told where there are any.
_OF_ROLLOUTS = ("rollout", "reward", "scoring")


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A moment that rates are counted from: steps done, clock, time spent outside of steps until then."""

    step: int
    time: float
    outside: float


class Rates:
    """The clock of one start. peak: FLOP/s of all devices; it and flops_per_token may be unknown (None)."""

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float | None,
        peak: float | None,
        total_steps: int,
        start_step: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.clock = clock
        self.begin = clock()
        self._tokens_per_step, self._flops_per_token, self._peak = tokens_per_step, flops_per_token, peak
        self._total_steps = total_steps
        self._lost: dict[str, float] = defaultdict(float)
        self._nested: list[float] = []
        self._start = self._mark = _Mark(start_step, self.begin, 0.0)
        self._started = False

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time inside as lost to `what`: input, compile, evaluate, checkpoint, or a part of
        reinforcement learning. May be nested."""
        if what not in _SHARES + _OF_ROLLOUTS:
            raise ValueError(f"{what!r} is none of {', '.join(_SHARES + _OF_ROLLOUTS)}")
        begin = self.clock()
        self._nested.append(0.0)
        try:
            yield
        finally:
            elapsed = self.clock() - begin
            self._lost[what] += elapsed - self._nested.pop()
            if self._nested:
                self._nested[-1] += elapsed

    def before_step(self, step: int) -> None:
        """`step` is about to be dispatched; the first one starts the clock of the rates."""
        if not self._started:
            self._started = True
            self._start = self._mark = _Mark(step - 1, self.clock(), self._outside)

    def mark(self, step: int, now: float) -> None:
        """The next rates are counted from here."""
        self._mark = _Mark(step, now, self._outside)

    def since_mark(self, step: int, now: float) -> dict[str, float]:
        """Rates since the last mark, without the time of compilation, evaluation and checkpoints."""
        seconds = now - self._mark.time - (self._outside - self._mark.outside)
        steps = step - self._mark.step
        if steps <= 0 or seconds <= 0:
            return {}
        rates = {
            "train/step_seconds": seconds / steps,
            "train/tokens_per_second": self._tokens_per_step * steps / seconds,
        }
        if self._flops_per_token is not None:
            flops = rates["train/tokens_per_second"] * self._flops_per_token
            rates["train/model_flops_per_second"] = flops
            if self._peak is not None:
                rates["train/mfu"] = flops / self._peak
        return rates

    def shares(self, now: float) -> dict[str, float]:
        """What share of this start's time is lost to what."""
        elapsed = max(now - self.begin, 1e-9)
        known = (*_SHARES, *(what for what in _OF_ROLLOUTS if what in self._lost))
        return {what: self._lost[what] / elapsed for what in known}

    def eta(self, step: int, now: float) -> float:
        """Seconds to the last step, at the mean pace since the first one, saving and evaluating included."""
        steps, seconds = step - self._start.step, now - self._start.time
        return (self._total_steps - step) * seconds / steps if steps > 0 else float("inf")

    @property
    def _outside(self) -> float:
        return sum(self._lost[what] for what in _OUTSIDE_STEPS)
