"""The folder of a run: what lies where, whose it is, and whether a config may go on with it. Builds nothing.

    config.json overrides.json manifest.json tokenizer/ checkpoints/STEP/ metrics.jsonl goodput.jsonl tensorboard/
    loss.png log*.txt

`config.json` is written last at a start: a folder without it has begun no run. Configs are plain nested dicts here.
"""

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from t5x_like.core import formats
from t5x_like.core.errors import UsageError, UserError
from t5x_like.storage import lock, manifest, paths
from t5x_like.storage.model_directory import CHECKPOINTS, TOKENIZER

if TYPE_CHECKING:
    from t5x_like.parallel.multihost import Processes

CONFIG, OVERRIDES = "config.json", "overrides.json"

# What a start or a run that never got to its first config.json may have left.
_BEFORE_CONFIG = (
    lock.LOCAL_NAME,
    lock.REMOTE_NAME,
    manifest.NAME,
    OVERRIDES,
    TOKENIZER,
    "cache",
    "profile",
    "tensorboard",
)
_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Change:
    """One field that two configs do not share; the values as JSON, None for absent."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.before)} -> {_shown(self.after)}"

    def within(self, fields: Collection[str]) -> bool:
        """Whether it is a change of one of these fields or sections."""
        return any(f"{self.path}.".startswith(f"config.{field}.") for field in fields)


def read_config(root: str) -> dict[str, Any] | None:
    """The config that a workdir was started with, in the present format; None if it holds no run.

    Raises UserError if it is damaged, or of a newer format.
    """
    stored = _read_stored(root)
    return None if stored is None else formats.upgrade(stored, where=paths.join(paths.normal(root), CONFIG))


def _read_stored(root: str) -> dict[str, Any] | None:
    """config.json as it is."""
    path = paths.join(paths.normal(root), CONFIG)
    if not paths.exists(path):
        return None
    config = paths.read_json(path)
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged: no mapping of sections; restore the file from a copy, or use a new workdir"
        )
    return config


def recorded_threads(root: str) -> int | None:
    """The thread count of a run's first start, which its bits depend on on CPU; None if it holds no run."""
    starts = manifest.read(paths.normal(root))["starts"]
    threads = starts[0].get("threads") if starts else None
    return threads if isinstance(threads, int) else None


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every field in which two configs differ, by path.

    >>> [str(change) for change in differences({"a": {"b": 1, "c": [2]}}, {"a": {"b": 1.5, "c": [2]}, "d": 0})]
    ['config.a.b: 1 -> 1.5', 'config.d: absent -> 0']
    """
    one, two = dict(_fields(before, "config")), dict(_fields(after, "config"))
    return [
        Change(path, one.get(path, _ABSENT), two.get(path, _ABSENT))
        for path in sorted(one.keys() | two.keys())
        if one.get(path, _ABSENT) != two.get(path, _ABSENT)
    ]


class Workdir:
    """An open workdir. Process 0 alone writes its files; the others only read."""

    def __init__(self, root: str, *, process: int, write: bool):
        self.root = paths.normal(root)
        self._process = process
        self._writes = process == 0 and write

    @classmethod
    @contextlib.contextmanager
    def open(cls, root: str, *, processes: "Processes", write: bool = True) -> Iterator["Workdir"]:
        """Makes the folder if need be, takes its lock, and checks what stands in it; for all processes together.

        `write` off looks only. Raises UserError for a folder that is not a workdir, is damaged, or is in use.
        """
        workdir = cls(root, process=processes.index, write=write)
        with contextlib.ExitStack() as stack:
            error = None
            if processes.primary:
                try:
                    if write:
                        paths.make_directory(workdir.root)
                        workdir._refuse_foreign()
                        stack.enter_context(lock.locked(workdir.root))
                    workdir._refuse_foreign()
                    workdir._verify_files()
                except UserError as caught:
                    error = caught
            told = processes.broadcast(f"workdir {workdir.root}", str(error) if error else None)
            if error is not None:
                raise error
            if told is not None:
                raise UserError(told)
            yield workdir

    def path(self, *names: str) -> str:
        return paths.join(self.root, *names)

    @property
    def checkpoints(self) -> str:
        return self.path(CHECKPOINTS)

    @property
    def tokenizer(self) -> str:
        return self.path(TOKENIZER)

    @property
    def log_path(self) -> str | None:
        """The log of this process; None on gs://, where files that grow are staged by who writes them."""
        if paths.is_remote(self.root):
            return None
        return self.path("log.txt" if self._process == 0 else f"log.{self._process}.txt")

    def config(self) -> dict[str, Any] | None:
        return read_config(self.root)

    def manifest(self) -> dict[str, Any]:
        return manifest.read(self.root)

    def check_config(self, new: Mapping[str, Any], *, may_change: Collection[str]) -> list[Change]:
        """What the new config changes of the stored one, all of it below `may_change`; [] for a new workdir.

        Raises UsageError with the differences where it changes what the run is.
        """
        stored = self.config()
        if stored is None:
            return []
        changes = differences(stored, paths.as_json(new))
        refused = [change for change in changes if not change.within(may_change)]
        if refused:
            shown = "; ".join(str(change) for change in refused[:_SHOWN])
            more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
            raise UsageError(
                f"{self.root} holds a run of another config ({shown}{more}); a resume may change "
                f"{', '.join(may_change)}. For a new run from these parameters, use a new --workdir with "
                f"--config.checkpoint.init_from={self.root}, or with branch_from to take optimizer state and step too"
            )
        return changes

    def record_start(
        self,
        *,
        config: Mapping[str, Any],
        overrides: Mapping[str, Any],
        entry: Mapping[str, Any],
        goodput: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes overrides.json, the entry of this start and config.json, its format included. Only process 0 does.

        goodput: what all starts so far have spent (training/goodput.py), as JSON.

        In this order, so that whenever the process is killed the config that stands there is one of the manifest.
        """
        if not self._writes:
            return
        content = self.manifest()
        content.pop("finished", None)
        files = manifest.file_digests(self.tokenizer) if paths.exists(self.tokenizer) else {}
        config = formats.stored(config)
        entry = {**entry, "config_sha256": manifest.config_digest(config), "tokenizer_sha256": files}
        content["starts"] = [*content["starts"], entry]
        if goodput is not None:
            content["goodput"] = dict(goodput)
        manifest.write(self.root, content)
        paths.write_json_atomic(self.path(OVERRIDES), dict(overrides))
        paths.write_text_atomic(self.path(CONFIG), paths.json_text(config))

    def record_finished(self, step: int) -> None:
        """Notes that all steps are done and everything is written."""
        if self._writes:
            manifest.write(self.root, {**self.manifest(), "finished": {"step": step, "time": round(time.time(), 3)}})

    def record_goodput(self, spent: Mapping[str, Any]) -> None:
        """Notes what all starts have spent, at the end of one."""
        if self._writes:
            manifest.write(self.root, {**self.manifest(), "goodput": dict(spent)})

    def finished_step(self) -> int | None:
        """The steps of a run that ended here with all of them done; None if it did not."""
        finished = self.manifest().get("finished")
        return finished["step"] if finished else None

    def check_data(self, fingerprint: str) -> None:
        """Raises UserError if the data is not what the run has read so far: its config may name it as before."""
        starts = self.manifest()["starts"] if self.config() is not None else []
        before = starts[-1].get("data", fingerprint) if starts else fingerprint
        if before != fingerprint:
            raise UserError(
                f"{self.root}: the data has changed since the run was started (fingerprint {before[:12]}, now "
                f"{fingerprint[:12]}); give it the text, tokenizer and config.data that it was started "
                f"with, or use a new --workdir with --config.checkpoint.init_from={self.root}"
            )

    def _refuse_foreign(self) -> None:
        names = [name for name in paths.list_names(self.root) if not name.startswith(".")]
        if CONFIG in names:
            return
        if CHECKPOINTS in names and paths.list_names(self.checkpoints):
            raise UserError(f"{self.root} holds checkpoints but no {CONFIG}; restore that file, or use a new --workdir")
        foreign = [n for n in names if n not in (*_BEFORE_CONFIG, CHECKPOINTS) and not _is_run_file(n)]
        if foreign:
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UserError(
                f"{self.root} is no workdir: it holds {shown} and no {CONFIG}; use a new or empty --workdir"
            )

    def _verify_files(self) -> None:
        """config.json and the tokenizer must be what some start, and the latest start, wrote."""
        starts, config = self.manifest()["starts"], _read_stored(self.root)
        if config is None:
            return
        if not starts:
            raise UserError(
                f"{self.root} holds {CONFIG} but no start in {manifest.NAME}; restore it, or use a new workdir"
            )
        if manifest.config_digest(config) not in {entry.get("config_sha256") for entry in starts}:
            raise UserError(
                f"{self.path(CONFIG)} is not what the run was started with (its sha256 is in no start of "
                f"{manifest.NAME}); restore the file, and change a run by --config and --config.a.b=value instead"
            )
        recorded = starts[-1].get("tokenizer_sha256", {})
        found = manifest.file_digests(self.tokenizer) if recorded else {}
        for name, digest in recorded.items():
            if found.get(name) != digest:
                how = "is missing" if name not in found else "has changed"
                raise UserError(f"{self.path(TOKENIZER, name)} {how} since the run was started; restore the file")


_ABSENT = type("_Absent", (), {"__repr__": lambda self: "absent"})()


def _fields(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_run_file(name: str) -> bool:
    return name.startswith("log") and name.endswith(".txt") or name in ("metrics.jsonl", "loss.png", "goodput.jsonl")
