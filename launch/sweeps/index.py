"""The index of a sweep, `sweep.json` in its folder: which members there are, and what has happened to each.

It is written whole or not at all after every change, on a disk or in a bucket. What came of a run stands in the run's
own workdir, which is always believed first: an index that a killed sweep left behind says "running", its workdirs know
better. The format is for ever: what is added gets a new number here, and older files are still read.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.sweeps.members import Member
from t5x_like.core.errors import UserError
from t5x_like.storage import paths

NAME = "sweep.json"
FORMAT = 1

# States of a member. submitted: handed to a cluster, whose business it is from then on. saved: it goes on at the next
# start of the sweep, or of its next rung; stopped: an early stop left it where it is.
WAITING, RUNNING, SUBMITTED, SAVED = "waiting", "running", "submitted", "saved"
STOPPED, DONE, FAILED = "stopped", "done", "failed"
_STATES = (WAITING, RUNNING, SUBMITTED, SAVED, STOPPED, DONE, FAILED)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A member. steps: of its whole run. seconds: of its starts on this machine. said: its last line if it failed."""

    member: Member
    state: str = WAITING
    steps: int = 0
    starts: int = 0
    seconds: float = 0.0
    status: int | None = None
    said: str = ""

    @property
    def name(self) -> str:
        return self.member.name


@dataclasses.dataclass(frozen=True)
class Decision:
    """What an early stop decided after `steps` steps. ranking: (member, its value of the metric), best first."""

    steps: int
    metric: str
    ranking: tuple[tuple[str, float | None], ...]
    promoted: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a sweep was started with. config: the `--config...` arguments of all members. launch: flags about where.

    metric and goal: "" for the usual. halving: (the share that goes on is 1 in this many, steps of the first rung).
    max_parallel and gpus_each: as the flags; None and 0 for the usual. A field that is added later has a default, which
    an index without it means.
    """

    config: tuple[str, ...]
    target: str
    launch: Mapping[str, Any]
    metric: str = ""
    goal: str = ""
    halving: tuple[int, int] | None = None
    max_parallel: int | None = None
    gpus_each: int = 0


class Index:
    """The index of one folder, as it stands on the disk after every change."""

    def __init__(self, folder: str, settings: Settings, entries: list[Entry], decisions: list[Decision]):
        self.folder, self.settings, self.decisions = folder, settings, decisions
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def workdir(self, name: str) -> str:
        return paths.join(self.folder, name)

    def add(self, member: Member, steps: int = 0) -> None:
        """Adds a member, or notes how many steps one has; `write` makes it last."""
        entry = self._entries.get(member.name, Entry(member))
        self._entries[member.name] = dataclasses.replace(entry, steps=steps or entry.steps)

    def change(self, name: str, **changes: Any) -> Entry:
        self._entries[name] = dataclasses.replace(self._entries[name], **changes)
        self.write()
        return self._entries[name]

    def decide(self, decision: Decision, stopped: Sequence[str]) -> None:
        """Notes a decision and whom it stops, in one write: no kill comes between the two."""
        self.decisions.append(decision)
        for name in stopped:
            self._entries[name] = dataclasses.replace(self._entries[name], state=STOPPED)
        self.write()

    def write(self) -> None:
        paths.write_json_atomic(path_of(self.folder), _to_json(self))


def path_of(folder: str) -> str:
    return paths.join(folder, NAME)


def exists(folder: str) -> bool:
    return paths.exists(path_of(folder))


def stamp(folder: str) -> bytes:
    """Tells whether an index has changed: all of it, b"" where there is none."""
    return paths.read_bytes(path_of(folder)) if exists(folder) else b""


def read(folder: str) -> Index:
    """The index of a folder. UserError where there is none, or it is damaged or of a later format."""
    path = path_of(folder)
    if not paths.exists(path):
        raise UserError(
            f"{folder} holds no sweep (no {NAME}); give the --workdir of one, or start it with --config=FILE"
        )
    content = paths.read_json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is no index of a sweep; restore the file from a copy, or use another --workdir")
    if content["format"] > FORMAT:
        raise UserError(f"{path} has format {content['format']}, and this program reads up to {FORMAT}; update it")
    try:
        return _from_json(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(
            f"{path} is damaged ({reason}); restore the file from a copy, or use another --workdir"
        ) from None


def _to_json(index: Index) -> dict[str, Any]:
    def entry(each: Entry) -> dict[str, Any]:
        fields = {field.name: getattr(each, field.name) for field in dataclasses.fields(each)}
        member: Member = fields.pop("member")
        return {"name": member.name, "point": dict(member.point), **fields, "seconds": round(each.seconds, 3)}

    return {
        "format": FORMAT,
        **dataclasses.asdict(index.settings),
        "members": [entry(each) for each in index],
        "decisions": [dataclasses.asdict(decision) for decision in index.decisions],
    }


def _from_json(folder: str, content: Mapping[str, Any]) -> Index:
    def entry(given: Mapping[str, Any]) -> Entry:
        fields = {name: value for name, value in given.items() if name not in ("name", "point")}
        if given["state"] not in _STATES:
            raise ValueError(f"state {given['state']!r}")
        point = {path: tuple(value) if isinstance(value, list) else value for path, value in given["point"].items()}
        return Entry(Member(given["name"], point), **fields)

    def decision(given: Mapping[str, Any]) -> Decision:
        ranking = tuple((name, value) for name, value in given["ranking"])
        return Decision(given["steps"], given["metric"], ranking, tuple(given["promoted"]))

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = {name: content[name] for name in names if name in content}
    settings["config"] = tuple(settings["config"])
    settings["halving"] = None if settings["halving"] is None else tuple(settings["halving"])
    entries = [entry(each) for each in content["members"]]
    return Index(folder, Settings(**settings), entries, [decision(each) for each in content["decisions"]])
