"""What stands around any loop: processes and their watch, the workdir, checkpoints, telemetry, the record of a start.

A session knows no step, no batch and no objective, so that loops of other kinds run within it the same way:

    with Session(request, runtime, environment) as session:
        session.open_workdir(config, overrides=..., may_change=...)
        session.run(loop, checkpoint=..., steps=...)     the loop calls record_start and telemetry before its first step

The order is the contract: whatever fails reaches the other processes first, and a run is recorded as finished only
after everything that it wrote is closed.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax

from t5x_like.core.environment import Environment, RuntimeConfig
from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers.vocabularies import SETTINGS, Vocabulary
from t5x_like.parallel import multihost
from t5x_like.storage import manifest, paths
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.workdir import Workdir
from t5x_like.training import goodput, starts
from t5x_like.training.faults import PREEMPTED, Faults
from t5x_like.training.goodput import Account
from t5x_like.training.keep import CheckpointConfig, steps_to_keep
from t5x_like.training.ledger import Ledger
from t5x_like.training.telemetry import Telemetry, TelemetryConfig


class Outcome(Protocol):
    """What a loop comes back with: whether all of its steps are done."""

    @property
    def finished(self) -> bool: ...


Value = TypeVar("Value")
Ended = TypeVar("Ended", bound=Outcome)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for. check: build everything, write nothing and run nothing."""

    workdir: str
    check: bool
    coordinator: str | None
    process_id: int | None
    num_processes: int | None
    began: float = dataclasses.field(default_factory=time.time)  # seconds since 1970, when the command was called


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads besides its config, for its records: `data` is a fingerprint, `mesh` {axis: size}."""

    data: str
    vocabulary: Vocabulary
    mesh: Mapping[str, int]


class Session:
    """Use as a context manager; `processes` and `faults` stand within it, `workdir` after `open_workdir`."""

    processes: multihost.Processes
    faults: Faults
    workdir: Workdir
    changes: list[str]  # what the config changes of the stored one
    ledger: Ledger  # what this start spends its time on

    def __init__(self, request: Request, runtime: RuntimeConfig, environment: Environment):
        self.request, self.environment, self._runtime = request, environment, runtime
        self._stack = contextlib.ExitStack()
        self._loop = contextlib.ExitStack()  # what is closed when the loop ends
        self._config: Mapping[str, Any] = {}
        self._overrides: Mapping[str, Any] = {}
        self._branched_from: str | None = None
        self._noted: list[str] = []
        self.ledger = Ledger(request.began)
        self._earlier = goodput.earlier([], entry=0)
        self._telemetry: Telemetry | None = None
        self._how, self._recorded = "", False

    def __enter__(self) -> "Session":
        self.processes = multihost.start(
            self._runtime,
            coordinator=self.request.coordinator,
            process_id=self.request.process_id,
            num_processes=self.request.num_processes,
        )
        # Before anything that may fail: an exception on one process must reach the others, not wait for them.
        self.faults = self.hold(Faults(self._runtime, log_path=None, processes=self.processes))
        self.faults.before_exit(self._part)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def hold(self, context: contextlib.AbstractContextManager[Value]) -> Value:
        """Enters a context that is left with the session, in reverse order."""
        return self._stack.enter_context(context)

    def open_workdir(
        self, config: Mapping[str, Any], *, overrides: Mapping[str, Any], may_change: Collection[str]
    ) -> None:
        """Locks and checks the workdir; `config` is as it will be stored. Raises UsageError for one of another run."""
        self._config, self._overrides = config, overrides
        opened = Workdir.open(self.request.workdir, processes=self.processes, write=not self.request.check)
        self.workdir = self.hold(opened)
        self.changes = [str(change) for change in self.workdir.check_config(config, may_change=may_change)]

    def branch(self, checkpoint: str, changes: Sequence[str]) -> None:
        """Notes that this start goes on from a checkpoint of another run, and what it changes of that run."""
        self._branched_from = checkpoint
        self.changes = [*self.changes, *changes]

    def note(self, line: str) -> None:
        """Something unusual about this start, for its screen."""
        self._noted.append(line)

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """What comes before the loop and may take long. From the first one on this start is written down."""
        if self.processes.primary and not self.request.check and self.ledger.path is None:
            self.ledger.record(self.workdir.root)
            self._stack.push(self._close_ledger)
        with self.faults.phase("prepare"), self.ledger.part("prepare"):
            yield

    def run(self, loop: Callable[[Checkpoints], Ended], *, checkpoint: CheckpointConfig, steps: int) -> Ended:
        """What the loop gives. If all its `steps` are done, that is recorded once everything it wrote is closed."""
        with self._loop as stack:
            checkpoints = Checkpoints(
                self.workdir.checkpoints,
                keep=functools.partial(steps_to_keep, config=checkpoint),
                asynchronous=checkpoint.asynchronous,
                timeout_seconds=checkpoint.timeout_seconds,
                on_fault=warn,
            )
            stack.enter_context(checkpoints)
            with self.faults.guard():
                outcome = loop(checkpoints)
        self._how = "finished" if outcome.finished else "stopped"
        if outcome.finished:
            self.workdir.record_finished(steps)
        return outcome

    def account(self) -> Account:
        """What all starts of the workdir have spent, up to the last line of the record."""
        return goodput.account(self._starts())

    def _starts(self) -> list[goodput.Start]:
        """None where they cannot be read: that costs their account, never the run."""
        try:
            return starts.read(self.workdir.root, record=self.ledger.path)
        except (UserError, OSError) as error:
            warn(f"no account of where the time went: {error}")
            return []

    def _part(self, line: str, status: int) -> None:
        """The last acts of a process that ends itself within seconds: what may take longest comes last."""
        self.ledger.end("stopped" if status == PREEMPTED else line)
        try:
            if self._telemetry is not None:
                self._telemetry.publish_log()
        finally:
            self.ledger.close()

    def _close_ledger(self, kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self.ledger.end(self._how if error is None else f"{kind.__name__}: {' '.join(str(error).split())[:200]}")
        with contextlib.suppress(UserError, OSError):  # a full disk has ended this start, or will end the next
            if self._recorded and (known := self._starts()):
                self.workdir.record_goodput(goodput.account(known).as_json())
        self.ledger.close()

    def telemetry(
        self,
        config: TelemetryConfig,
        *,
        flops_per_token: float | None,
        tokens_per_step: int,
        devices: Sequence[jax.Device],
        total_steps: int,
        start_step: int,
    ) -> Telemetry:
        """The telemetry of the loop, closed when it ends."""
        self._telemetry = telemetry = Telemetry(
            config,
            self.workdir.root,
            flops_per_token=flops_per_token,
            tokens_per_step=tokens_per_step,
            devices=devices,
            compiler_options=self._runtime.compiler_options.of(jax.default_backend()),
            total_steps=total_steps,
            start_step=start_step,
            run_config=self._config,
            ledger=self.ledger,
            earlier=self._earlier,
        )
        self._loop.enter_context(telemetry)
        self.faults.log_to(telemetry.log_path)
        return telemetry

    def closing(self, close: Callable[[], object]) -> None:
        """Calls this when the loop ends, however it does."""
        self._loop.callback(close)

    def record_start(self, inputs: Inputs, *, resumed_from: int | None) -> None:
        """Writes config, tokenizer and the manifest's entry of this start, before the first step."""
        if not self.processes.primary:
            return
        vocabulary = inputs.vocabulary
        if not _is_saved(vocabulary.fingerprint, self.workdir.tokenizer):
            staged = paths.StagedDirectory(self.workdir.tokenizer)
            vocabulary.save(staged.local_path)
            staged.close()
        entry = manifest.start_entry(
            data=inputs.data,
            tokenizer=vocabulary.fingerprint,
            mesh=dict(inputs.mesh),
            platform=jax.default_backend(),
            devices=jax.device_count(),
            processes=jax.process_count(),
            threads=self.environment.threads,
            resumed_from=resumed_from,
            branched_from=self._branched_from,
            changes=self.changes,
        )
        index = len(self.workdir.manifest()["starts"])
        self.ledger.restored(resumed_from or 0, entry=index)
        known = self._starts()
        self._earlier = goodput.earlier(known, entry=index)
        spent = goodput.account(known).as_json() if known else None
        self.workdir.record_start(config=self._config, overrides=self._overrides, entry=entry, goodput=spent)
        self._recorded = True

    def metadata(self, inputs: Inputs) -> dict[str, Any]:
        """What every checkpoint says of the run: its config, and where it comes from."""
        return {
            "config": self._config,
            "provenance": {
                "data": inputs.data,
                "tokenizer": inputs.vocabulary.fingerprint,
                "revision": manifest.revision(),
                "versions": manifest.versions(),
                "mesh": dict(inputs.mesh),
                "threads": self.environment.threads,
            },
        }

    @property
    def notes(self) -> list[str]:
        """Lines for the start screen: what is unusual about this start."""
        changed = (f"changed at this start: {change}" for change in self.changes)
        return [*self.environment.notes, *changed, *self._noted]


def warn(text: str) -> None:
    """A line on the terminal, if that is still there."""
    with contextlib.suppress(OSError):
        print(f"t5x_like: {text}", file=sys.stderr, flush=True)


def _is_saved(vocabulary: str, folder: str) -> bool:
    """Whether the folder holds the vocabulary of this fingerprint, whole: its settings are written last."""
    settings = paths.join(folder, SETTINGS)
    return paths.exists(settings) and paths.read_json(settings).get("fingerprint") == vocabulary
