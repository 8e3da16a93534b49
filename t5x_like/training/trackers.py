"""Weights & Biases and MLflow, beside metrics.jsonl: where many runs are compared. A tracker never stops a run.

Each works in a thread of its own, so that a server that is slow or away holds no step, and is given up with one warning
at its first failure. Which run of the tracker a workdir writes to stands in WORKDIR/trackers.json, so that a resume
goes on in it. The libraries are imported when a config asks for them: `pip install t5x_like[trackers]`.
"""

import dataclasses
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from t5x_like.core.errors import UsageError
from t5x_like.storage import paths

_log = logging.getLogger(__name__)

IDS = "trackers.json"
_WAITING = 10_000  # rows that may wait for a tracker before it is given up
_LEAVING = 60.0  # s that the end of a run waits for what is still to be sent
_MOST_PARAMS = 100  # of one request to MLflow


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """project: "" for no Weights & Biases. mode: "offline" writes WORKDIR/wandb (send it by `wandb sync`), "online"."""

    project: str
    mode: str

    def check(self, path: str) -> None:
        if self.mode not in ("offline", "online"):
            raise UsageError(f"{path}.mode={self.mode!r} should be 'offline' or 'online'")


@dataclasses.dataclass(frozen=True)
class MlflowConfig:
    """uri: a folder or the address of a server; "" for no MLflow. experiment: its name there."""

    uri: str
    experiment: str


class Tracker(Protocol):
    """What a service is told of a run. Made by one thread, which makes every call; any exception ends it."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def describe(self, facts: Mapping[str, Any]) -> None: ...
    def picture(self, path: str) -> None: ...
    def close(self) -> None: ...


class _Wandb:
    def __init__(self, config: WandbConfig, place: "_Place"):
        import wandb  # pyright: ignore[reportMissingImports]

        self._library: Any = wandb
        settings = self._library.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True)
        self._run: Any = self._library.init(
            project=config.project,
            name=place.name,
            id=place.known("wandb", lambda: secrets.token_hex(8)),
            resume="allow",
            dir=place.local,
            mode=config.mode,
            config=dict(place.config),
            settings=settings,
        )
        # A resume may have changed the config, which the service would otherwise keep as it was.
        self._run.config.update(dict(place.config), allow_val_change=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def describe(self, facts: Mapping[str, Any]) -> None:
        self._run.summary.update({f"start/{name}": value for name, value in facts.items()})

    def picture(self, path: str) -> None:
        self._run.log({"curves": self._library.Image(path)})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, config: MlflowConfig, place: "_Place"):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = config.uri
        if "://" not in uri and not uri.startswith("file:"):
            uri = f"file:{paths.normal(uri)}"
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for a database otherwise
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        begun: list[str] = []

        def begin() -> str:
            begun.append(self._client.create_run(experiment, run_name=place.name).info.run_id)
            return begun[0]

        self._id = place.known("mlflow", begin)
        self._resumed, self._steps = not begun, {}
        self._client.update_run(self._id, status="RUNNING")
        if begun:  # parameters of a run are written once; what a resume changes is in the artifact
            params = [Param(name, str(value)[:500]) for name, value in _flat(place.config)]
            for start in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MOST_PARAMS])
        self._client.log_dict(self._id, dict(place.config), "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        new = [self._metric(name, float(value), now, step) for name, value in values.items() if step > self._seen(name)]
        self._client.log_batch(self._id, metrics=new)

    def _seen(self, name: str) -> int:
        """The last step that an earlier start has written: a resume comes to some steps again."""
        if not self._resumed:
            return -1
        if name not in self._steps:
            history = self._client.get_metric_history(self._id, name)
            self._steps[name] = max((metric.step for metric in history), default=-1)
        return self._steps[name]

    def describe(self, facts: Mapping[str, Any]) -> None:
        text = "\n".join(f"{name}: {value}" for name, value in facts.items())
        self._client.log_text(self._id, text, "start.txt")

    def picture(self, path: str) -> None:
        self._client.log_artifact(self._id, path)

    def close(self) -> None:
        self._client.set_terminated(self._id)


@dataclasses.dataclass(frozen=True)
class _Place:
    """root: the workdir. local: where its files are written. config: as it is stored."""

    root: str
    local: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return paths.base_name(self.root)

    def known(self, tracker: str, begin: Callable[[], str]) -> str:
        """The run of this workdir, begun if there is none. Only process 0 is here, one tracker after the other."""
        with _IDS_LOCK:
            path = paths.join(self.root, IDS)
            ids = paths.read_json(path) if paths.exists(path) else {}
            if tracker not in ids:
                ids[tracker] = begin()
                paths.write_json_atomic(path, ids)
            return ids[tracker]


_IDS_LOCK = threading.Lock()


class Background:
    """One tracker in its thread. All methods return at once but `close`, which waits at most a minute."""

    def __init__(self, name: str, begin: Callable[[], Tracker]):
        self._name = name
        self._actions: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._work, args=(begin,), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        copied = dict(values)
        self._tell(lambda tracker: tracker.log(step, copied))

    def describe(self, facts: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.describe(facts))

    def picture(self, path: str) -> None:
        self._tell(lambda tracker: tracker.picture(path))

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())
        self._put(None)
        self._thread.join(_LEAVING)
        if self._thread.is_alive():
            self._give_up(f"it has not taken everything within {_LEAVING:g} s")

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        if not self._failed:
            self._put(action)

    def _put(self, action: Callable[[Tracker], None] | None) -> None:
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            self._give_up(f"{_WAITING} rows wait for it")

    def _work(self, begin: Callable[[], Tracker]) -> None:
        try:
            tracker = begin()
            while (action := self._actions.get()) is not None and not self._failed:
                action(tracker)
        except ImportError as error:
            self._give_up(f"{type(error).__name__}: {error}; pip install t5x_like[trackers]")
        except BaseException as error:  # a library may raise anything, SystemExit included
            self._give_up(" ".join(f"{type(error).__name__}: {error}".split())[:300])

    def _give_up(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            _log.warning("%s stops here: %s; the run goes on, metrics.jsonl has everything", self._name, reason)


def open_trackers(
    wandb: WandbConfig, mlflow: MlflowConfig, *, root: str, local: str, config: Mapping[str, Any]
) -> list[Background]:
    """The trackers that a config asks for. `local` is the folder in which the files of the workdir `root` grow."""
    place, found = _Place(root, local, config), []
    if wandb.project:
        found.append(Background("Weights & Biases", lambda: _Wandb(wandb, place)))
    if mlflow.uri:
        found.append(Background("MLflow", lambda: _Mlflow(mlflow, place)))
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
