"""What a run tells: the start-up screen, the step line, metrics.jsonl, TensorBoard, log.txt, loss.png, a profile.

The loop hands over values; nothing here decides anything. Process 0 writes metrics and speaks on the terminal, every
process has its own log. Rates, times, shares and memory are of this process's start and exempt from bit equality
(`core/metrics.py:is_measurement`); the values of a row are those of that one step.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax

from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.metrics import JsonlWriter, TensorBoardWriter
from t5x_like.core.terminal import StatusLine, format_bytes, format_count, format_duration
from t5x_like.models.flops import CONVENTION
from t5x_like.storage import paths
from t5x_like.training import curves, goodput
from t5x_like.training.ledger import Ledger
from t5x_like.training.logs import close_logs, open_logs
from t5x_like.training.peaks import cpu_matmul_peak, device_peak
from t5x_like.training.rates import Rates
from t5x_like.training.trackers import MlflowConfig, WandbConfig, open_trackers

_log = logging.getLogger(__name__)

_SHOWN_FIRST = ("loss", "bits_per_byte", "perplexity", "accuracy")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A `jax.profiler` window of `steps` steps (0 for none) from step `start_step`, written to WORKDIR/profile."""

    start_step: int
    steps: int

    def check(self, path: str) -> None:
        for field in ("start_step", "steps"):
            if getattr(self, field) < 0:
                raise UsageError(f"{path}.{field}={getattr(self, field)} should be at least 0")


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """What is written beside metrics.jsonl and log.txt.

    tensorboard: events in WORKDIR/tensorboard
    plot: loss.png at the end, and at evaluations at least `plot_every_seconds` apart
    wandb, mlflow: training/trackers.py
    measure_cpu_peak: on CPU, time a matmul at the start (0.3 s), so that there is an MFU
    """

    tensorboard: bool
    plot: bool
    plot_every_seconds: float
    measure_cpu_peak: bool
    profile: ProfileConfig
    wandb: WandbConfig
    mlflow: MlflowConfig

    def check(self, path: str) -> None:
        if self.plot_every_seconds < 0:
            raise UsageError(f"{path}.plot_every_seconds={self.plot_every_seconds:g} should not be negative")


class Telemetry:
    """Writes the metrics and logs of one run, and shows its progress on the terminal; use as a context manager.

    `workdir` may be gs://: files then grow in a local folder, which `flush` and `close` upload. `start_step` is the
    number of updates that a restored state has behind it: rows of later steps are cut. `run_config`, as it is stored,
    is for the trackers. `ledger` is told of every part of this start, and `earlier` is what the starts before have
    spent (training/goodput.py), for the `goodput/` numbers of every row; without these there are none.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        workdir: str,
        *,
        flops_per_token: float | None,
        tokens_per_step: int,
        devices: Sequence[jax.Device],
        compiler_options: Mapping[str, Any] | None,
        total_steps: int,
        start_step: int,
        run_config: Mapping[str, Any] | None = None,
        ledger: Ledger | None = None,
        earlier: Mapping[str, float] | None = None,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config = config
        self._process = jax.process_index()
        self._staged = _stage(workdir, [self._log_name] + ([] if self._process else ["metrics.jsonl"]))
        self._directory = directory = self._staged.local_path
        self._devices = [device for device in devices if device.process_index == self._process]
        self._flops_per_token, self._total_steps = flops_per_token, total_steps
        self._peak, self._peak_source = _peak(config, devices, compiler_options)
        self._rates = Rates(
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token,
            peak=self._peak,
            total_steps=total_steps,
            start_step=start_step,
            clock=clock,
        )
        self._ledger, self._earlier = ledger or Ledger(time.time()), earlier
        self._plotted_at, self._plot_seconds = self._rates.begin, 0.0
        self._profiling = False
        self._line = StatusLine(stream if stream is not None else sys.stdout)
        with paths.writing(self.log_path):
            self._handlers = open_logs(self.log_path, self._line)
        self._trackers = (
            open_trackers(config.wandb, config.mlflow, root=workdir, local=directory, config=run_config or {})
            if self._process == 0
            else []
        )
        self._rows: JsonlWriter | None = None
        self._events: TensorBoardWriter | None = None
        if self._process == 0:
            metrics = os.path.join(directory, "metrics.jsonl")
            with paths.writing(metrics):
                self._rows = JsonlWriter(metrics)
                self._rows.truncate_after(start_step)
            if config.tensorboard:
                self._events = TensorBoardWriter(os.path.join(directory, "tensorboard"), restored_step=start_step)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            # The exception that ended the run matters more than this one.
            _log.warning("%s", error)

    @property
    def plot_path(self) -> str:
        """Where the reader of the run will find the picture."""
        return paths.join(self._staged.path, "loss.png")

    @property
    def log_path(self) -> str:
        """The local file of this process's log, wherever the workdir is."""
        return os.path.join(self._directory, self._log_name)

    @property
    def _log_name(self) -> str:
        return f"log.{self._process}.txt" if self._process else "log.txt"

    def summary(self, sections: Mapping[str, Mapping[str, object]]) -> None:
        """Prints {title: {name: value}} as one screen, and how speed is counted below it."""
        sections = {**sections, "speed": self._speed()}
        for line in screen(sections):
            self._say(line)
        facts = {f"{title}/{name}": str(value) for title, rows in sections.items() for name, value in rows.items()}
        for tracker in self._trackers:
            tracker.describe(facts)

    def _speed(self) -> dict[str, object]:
        speed: dict[str, object] = {}
        if self._flops_per_token is not None:
            speed["model FLOPs"] = f"{format_count(self._flops_per_token)} a token"
            speed["counted"] = CONVENTION
        if self._peak is not None:
            speed["MFU"] = f"of {format_count(self._peak)}FLOP/s, {self._peak_source}"
        limits = [stats["bytes_limit"] for stats in self._memory() if "bytes_limit" in stats]
        if limits:
            speed["HBM"] = f"{format_bytes(min(limits))} a device"
        return speed

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Counts the time inside as lost to `what`, which is no step: see `Rates.timed` and training/goodput.py."""
        with self._rates.timed(what), self._ledger.part(what):
            yield

    def before_step(self, step: int) -> None:
        """`step` is about to be dispatched: starts the clock of the rates, opens and closes the profiler's window."""
        self._ledger.goes_on("steps")
        self._rates.before_step(step)
        window = self._config.profile
        if window.steps and step == window.start_step:
            jax.profiler.start_trace(os.path.join(self._directory, "profile"))
            self._profiling = True
        # Two steps may be in flight: the last one of the window is over when the second after it is dispatched.
        elif self._profiling and step >= window.start_step + window.steps + 2:
            self._stop_profile()

    def log_step(self, step: int, values: Mapping[str, float], *, write: bool) -> None:
        """Shows a finished step; with `write`, adds rates and makes it a row. Names come without `train/`."""
        self._ledger.step_done(step)
        if self._process:
            return
        now = self._rates.clock()
        rates = self._rates.since_mark(step, now)
        if write:
            shares = {f"time/{what}_share": share for what, share in self._rates.shares(now).items()}
            row = {f"train/{name}": value for name, value in values.items()} | rates | shares | self._memory_row()
            if self._earlier is not None:
                row |= goodput.shares(self._earlier, self._ledger.totals())
            self._row(step, row)
            self._rates.mark(step, now)
        if write or self._line.live:
            text = self._step_text(step, values, rates, now)
            if write:
                _log.info("%s", text)
            self._line.show(text)

    def log_evaluation(self, step: int, name: str, values: Mapping[str, float]) -> None:
        """A row `eval/NAME/...` and a line that stays."""
        if self._process:
            return
        self._row(step, {f"eval/{name}/{key}": value for key, value in values.items()})
        order = [key for key in _SHOWN_FIRST if key in values] + sorted(set(values) - set(_SHOWN_FIRST))
        text = "  ".join(f"{key.replace('_', ' ')} {values[key]:.4f}" for key in order)
        self._say(f"step {step}: {name}  {text}")
        pause = max(self._config.plot_every_seconds, 50 * self._plot_seconds)
        if self._config.plot and self._rates.clock() - self._plotted_at >= pause:
            self._plot()

    def flush(self, step: int, *, last: bool) -> None:
        """Makes all rows up to `step` safe. To be called before the checkpoint of that step.

        A bucket that is away costs a warning, as the next flush uploads them too; after the last one nothing would, and
        UserError keeps the checkpoint from being ahead of its rows for good.
        """
        if self._rows is not None:
            self._rows.flush()
        if self._events is not None:
            self._events.flush()
        try:
            self._staged.upload()
        except UserError as error:
            if last:
                raise UserError(f"{error}; the last metrics are not written: start again to resume") from None
            _log.warning("%s; metrics are uploaded again with the next checkpoint", error)
        self._ledger.save(step)
        _log.debug("metrics are flushed through step %d", step)

    def close(self) -> None:
        """Ends the live line, draws loss.png and closes all files."""
        self._ledger.goes_on("closing")
        self._line.end()
        try:
            if self._profiling:
                self._stop_profile()
            if self._rows is not None:
                self._rows.close()
                if self._config.plot:
                    self._plot()
            if self._events is not None:
                self._events.close()
            self._close_trackers()
        finally:
            close_logs(self._handlers)
            self._staged.close()

    def publish_log(self) -> None:
        """Uploads the log of this process, where the workdir is in a bucket: it is about to end without closing."""
        if paths.is_remote(self._staged.path):
            paths.copy_file(self.log_path, paths.join(self._staged.path, self._log_name))

    def _close_trackers(self) -> None:
        image = os.path.join(self._directory, "loss.png")
        for tracker in self._trackers:
            if self._config.plot and os.path.exists(image):
                tracker.picture(image)
        for tracker in self._trackers:
            tracker.close()

    def _row(self, step: int, values: Mapping[str, float]) -> None:
        assert self._rows is not None
        self._rows.write(step, values)
        if self._events is not None:
            self._events.write(step, values)
        for tracker in self._trackers:
            tracker.log(step, values)

    def _step_text(self, step: int, values: Mapping[str, float], rates: Mapping[str, float], now: float) -> str:
        parts = [f"step {step}/{self._total_steps}"]
        parts += [f"loss {values['loss']:.4f}"] if "loss" in values else []
        parts += [f"reward {values['reward']:.3f}"] if "reward" in values else []
        parts += [f"grad {values['grad_norm']:.3g}"] if "grad_norm" in values else []
        parts += [f"lr {values['learning_rate']:.2e}"] if "learning_rate" in values else []
        parts += ["update skipped"] if values.get("skipped") else []
        if "train/tokens_per_second" in rates:
            parts.append(f"{format_count(rates['train/tokens_per_second'])} tok/s")
        parts.append(f"ETA {format_duration(self._rates.eta(step, now))}")
        if "train/model_flops_per_second" in rates:
            parts.append(f"{format_count(rates['train/model_flops_per_second'])}FLOP/s")
        parts += [f"MFU {100 * rates['train/mfu']:.1f}%"] if "train/mfu" in rates else []
        shares = self._rates.shares(now)
        lost = [f"{what} {100 * shares[what]:.1f}%" for what in ("input", "checkpoint", "compile")]
        parts.append(f"lost: {' '.join(lost)}")
        return "  ".join(parts)

    def _memory(self) -> list[dict[str, Any]]:
        return [stats for device in self._devices if (stats := device.memory_stats())]

    def _memory_row(self) -> dict[str, float]:
        """The fullest device of this process; nothing where devices do not report (CPU)."""
        stats, row = self._memory(), {}
        for source, name in (("bytes_in_use", "in_use_bytes"), ("peak_bytes_in_use", "peak_bytes")):
            known = [each[source] for each in stats if source in each]
            if known:
                row[f"memory/{name}"] = max(known)
        return row

    def _say(self, text: str) -> None:
        """A line that stays on the terminal of process 0, and in every process's log."""
        _log.info("%s", text)
        if self._process == 0:
            self._line.print(text)

    def _stop_profile(self) -> None:
        self._profiling = False
        jax.profiler.stop_trace()
        self._say(f"profile: {paths.join(self._staged.path, 'profile')}")

    def _plot(self) -> None:
        begin = self._rates.clock()
        try:
            curves.draw(*(os.path.join(self._directory, name) for name in ("metrics.jsonl", "loss.png")))
        except OSError as error:
            # A picture must not end a run.
            _log.warning("%s: cannot draw: %s", self.plot_path, error)
        self._plotted_at = self._rates.clock()
        self._plot_seconds = self._plotted_at - begin


def _peak(
    config: TelemetryConfig, devices: Sequence[jax.Device], compiler_options: Mapping[str, Any] | None
) -> tuple[float | None, str]:
    """(FLOP/s of all devices together, where that figure comes from); None where it is not known."""
    first = devices[0]
    known = device_peak(first.device_kind)
    if known is not None:
        return known * len(devices), f"bf16 peak of {len(devices)} x {first.device_kind}"
    if first.platform == "cpu" and config.measure_cpu_peak:
        # All CPU devices of a process share its cores: one process, one peak.
        processes = len({device.process_index for device in devices})
        local = next(device for device in devices if device.process_index == jax.process_index())
        peak = cpu_matmul_peak(local, compiler_options=compiler_options)
        return peak * processes, "fp32 matmul peak measured here just now"
    return None, ""


def screen(sections: Mapping[str, Mapping[str, object]], *, width: int = 120) -> Iterator[str]:
    """Lines of {title: {name: value}} in three columns; a title stands at its first entry, long values are wrapped."""
    entries = [(title, name, str(value)) for title, rows in sections.items() for name, value in rows.items()]
    title_width = max((len(title) for title, _, _ in entries), default=0)
    name_width = max((len(name) for _, name, _ in entries), default=0)
    before = None
    for title, name, value in entries:
        head = f"{'' if title == before else title:<{title_width}}  {name:<{name_width}}  "
        indent = " " * len(head)
        yield from textwrap.wrap(value, width, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]
        before = title


def _stage(workdir: str, names: Sequence[str]) -> paths.StagedDirectory:
    """The workdir itself, or for gs:// a local folder with what the bucket has of the named files."""
    staged = paths.StagedDirectory(workdir)
    for name in names:
        if paths.is_remote(workdir) and paths.exists(paths.join(workdir, name)):
            paths.copy_file(paths.join(workdir, name), os.path.join(staged.local_path, name))
    return staged
