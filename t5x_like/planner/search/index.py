"""The index of a search, `search.json` in its folder: which points there are, and what is known of each.

It is written whole or not at all after every change. What the compiler said of a point is a file of its own,
`points/NAME.json`, which is believed first: a search that was killed finds there what was judged in its last moments.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.planner.search.space import Point
from t5x_like.storage import paths

NAME, FORMAT = "search.json", 1
POINTS, EXTENSION = "points", ".json"

# States of a point. illegal: `train` would refuse it; large: the analytic model says that it cannot fit; open: nobody
# asked the compiler; judged: it compiled and fits; refused: the compiler says that it does not fit; failed: the judge
# came to no end, for want of memory, of time, or by a fault.
ILLEGAL, LARGE, OPEN = "illegal", "large", "open"
JUDGED, REFUSED, FAILED = "judged", "refused", "failed"
ASKED = (JUDGED, REFUSED, FAILED)
_STATES = (ILLEGAL, LARGE, OPEN, *ASKED)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a plan says of a point that fits. seconds: of a step; bytes: HBM of a device; the rest as in its JSON."""

    seconds: float
    bytes: int
    bound_by: str
    mfu: float
    cycles: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A point. analytic: {"bytes", "seconds", "bound_by"} of the analytic model, none of an illegal one. said: why it
    is in this state, in one line. confirmed: the verdict with the config's own compiler options, where points are
    explored with those of the compiler. limits: memory and seconds of a judge that came to no end."""

    point: Point
    state: str
    said: str = ""
    analytic: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verdict: Verdict | None = None
    confirmed: Verdict | None = None
    refused: str = ""  # what the compiler said when it was to be confirmed and did not fit
    unconfirmed: str = ""  # why its judge came to no end when it was to be confirmed
    limits: tuple[float, float] = (0.0, 0.0)

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def best(self) -> Verdict | None:
        """The verdict that counts."""
        return None if self.refused else self.confirmed or self.verdict


class Index:
    """The points of a space. settings: what makes two searches the same, compared when one goes on. earlier: points
    that were asked about in other spaces, which are kept and count for nothing here."""

    def __init__(
        self, folder: str, settings: Mapping[str, Any], entries: Sequence[Entry], earlier: Sequence[Entry] = ()
    ):
        self.folder, self.settings = folder, dict(settings)
        self._entries = {entry.name: entry for entry in entries}
        self._earlier = tuple(earlier)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __len__(self) -> int:
        return len(self._entries)

    def change(self, name: str, *, write: bool = True, **changes: Any) -> None:
        """write: False where more changes follow at once."""
        self._entries[name] = dataclasses.replace(self._entries[name], **changes)
        if write:
            self.write()

    def write(self) -> None:
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "points": [_to_json(entry) for entry in (*self, *self._earlier)],
        }
        paths.write_json_atomic(paths.join(self.folder, NAME), content)

    def plan_path(self, name: str, *, confirmed: bool = False) -> str:
        """Where the plan of a point lies, as its judge has written it."""
        return _plans(self.folder, name)[confirmed]


def opened(folder: str, settings: Mapping[str, Any], entries: Sequence[Entry]) -> Index:
    """The index of a folder: a new one, or the one that is there with what it knows of these entries.

    Raises UserError where the folder holds a search of something else. A failed point is taken up anew.
    """
    path = paths.join(folder, NAME)
    if not paths.exists(path):
        plans = paths.join(folder, POINTS)
        if paths.exists(plans) and any(name.endswith(EXTENSION) for name in paths.list_names(plans)):
            raise UserError(f"{folder} holds plans of a search whose {NAME} is gone; delete it, or give --search_dir")
        return Index(folder, settings, entries)
    before = _read(folder)
    mine = json.loads(json.dumps(dict(settings)))
    other = _difference(before["settings"], mine)
    if other:
        raise UserError(f"{folder} holds another search ({other}); give another --search_dir, or delete that folder")
    known = {entry.name: entry for entry in map(_from_json, before["points"])}
    kept = []
    for entry in entries:
        old = known.get(entry.name)
        same = old is not None and dict(old.point.overrides) == json.loads(json.dumps(dict(entry.point.overrides)))
        if same and old is not None and old.state in ASKED and entry.state != ILLEGAL:
            entry = dataclasses.replace(old, point=entry.point, analytic=entry.analytic)
        elif old is not None and not same:
            _forget(folder, entry.name)
        kept.append(entry)
    fresh = {entry.name for entry in entries}
    others = [each for each in known.values() if each.name not in fresh]
    # Also those whose judge ended when the search was killed: a plan belongs to a point that the index knows.
    others = [each for each in others if each.state in ASKED or any(map(paths.exists, _plans(folder, each.name)))]
    return Index(folder, mine, kept, others)


def _forget(folder: str, name: str) -> None:
    """Removes the plans of another point that had this name in an earlier space."""
    for path in _plans(folder, name):
        pathlib.Path(path).unlink(missing_ok=True)


def _plans(folder: str, name: str) -> tuple[str, str]:
    """(the plan of a point, that with the config's own compiler options)."""
    plain, confirmed = (paths.join(folder, POINTS, f"{name}{kind}{EXTENSION}") for kind in ("", ".confirmed"))
    return plain, confirmed


def _read(folder: str) -> dict[str, Any]:
    path = paths.join(folder, NAME)
    content = paths.read_json(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is no index of a search; delete {folder}, or give another --search_dir")
    if content["format"] > FORMAT:
        raise UserError(f"{path} has format {content['format']}, and this program reads up to {FORMAT}; update it")
    try:
        found = {"settings": dict(content["settings"]), "points": list(content["points"])}
        [_from_json(each) for each in found["points"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{path} is damaged ({reason}); delete {folder}, or give another --search_dir") from None
    return found


def _to_json(entry: Entry) -> dict[str, Any]:
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    point: Point = fields.pop("point")
    for name in ("verdict", "confirmed"):
        fields[name] = None if fields[name] is None else dataclasses.asdict(fields[name])
    return {"name": point.name, "overrides": dict(point.overrides), **fields}


def _from_json(given: Mapping[str, Any]) -> Entry:
    fields = {name: value for name, value in given.items() if name not in ("name", "overrides")}
    if given["state"] not in _STATES:
        raise ValueError(f"state {given['state']!r}")
    for name in ("verdict", "confirmed"):
        fields[name] = None if fields[name] is None else Verdict(**fields[name])
    fields["limits"] = tuple(fields["limits"])
    return Entry(Point(given["name"], dict(given["overrides"])), **fields)


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first thing in which two settings differ, "" where they are equal.

    >>> _difference({"config": {"seed": 1}}, {"config": {"seed": 2}})
    'config.seed was 1 and is 2'
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = sorted({*before, *now})
        found = (_difference(before.get(n), now.get(n), f"{path}.{n}" if path else str(n)) for n in names)
        return next(filter(None, found), "")
    return "" if before == now else f"{path} was {json.dumps(before)[:60]} and is {json.dumps(now)[:60]}"
