"""Facts about files that take a reading of them all: read once, remembered in the cache, shared between machines.

A fact is remembered by path, size and time of change (in a bucket: the checksum), so a file that is as it was is not
read again. Of machines that write parts of one cache each begins with its own share of the files and publishes what
it found; what nobody has read when that is done it reads itself, so that no machine waits for another one.
"""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from t5x_like.core.environment import cores
from t5x_like.core.errors import UserError
from t5x_like.data import cache
from t5x_like.storage import paths

_SETTLED = 2_000_000_000  # nanoseconds: a file that changed later than this before may change again unnoticed
_UNIT, _MOST_UNITS = 256 << 20, 1024  # bytes that a machine reads before it looks what the others have; units at most


@dataclasses.dataclass(frozen=True)
class Share:
    """Machine `part`, from 1, of `count` that write the cache at `place`, local or gs://."""

    place: str
    part: int
    count: int


def state(path: str) -> list[Any]:
    """What changes when a file does. OSError where there is none."""
    return [path, *paths.state(path)]


def state_of_folder(path: str) -> list[Any]:
    """What changes when one of the files in a folder does."""
    inside = paths.states(path)
    return [path, inside, max((changed for *_, changed in inside.values() if isinstance(changed, int)), default=0)]


def facts(
    name: str,
    key: Any,
    states: Sequence[list[Any]],
    read: Callable[[int], Any],
    *,
    costs: Sequence[int],
    folder: pathlib.Path | None,
    share: Share | None = None,
    keep: Callable[[list[Any]], bool] = lambda found: True,
) -> list[Any]:
    """`read(i)` of each file i, several at a time, as JSON gives it back; what is remembered is not read.

    name, key: what facts these are; states: `state` of each file; costs: bytes that are read of each; folder: the
    local folder of the cache, None to remember nothing; keep: whether these facts are worth remembering
    """
    if folder is None or not _settled(states):
        return _read(read, range(len(states)))
    file = f"{name}-{cache.digest([key, states])[:16]}.json"
    found = _remembered(str(folder / file))
    if found is None and share is not None:
        found = _shared(paths.join(share.place, file), read, costs, share)
    if found is None:
        found = _read(read, range(len(states)))
        if not keep(found):
            return found
    _remember(str(folder / file), found)
    if share is not None:
        _remember(paths.join(share.place, file), found)
        with contextlib.suppress(OSError, UserError):
            paths.remove_tree(_published(paths.join(share.place, file)))
    return found


def _settled(states: Sequence[list[Any]]) -> bool:
    """Whether a change from now on would show in the times. A bucket tells checksums."""
    times = [state[-1] for state in states if isinstance(state[-1], int)]
    return max(times, default=0) < time.time_ns() - _SETTLED


def _shared(file: str, read: Callable[[int], Any], costs: Sequence[int], share: Share) -> list[Any]:
    """The facts of all files, those that other machines publish meanwhile among them."""
    units, folder = _units(costs), _published(file)
    first, behind = (len(units) * number // share.count for number in (share.part - 1, share.part))
    others = [*range(first), *range(behind, len(units))]
    random.Random(share.part).shuffle(others)  # so that several do not take over the same ones
    todo = [*range(first, behind), *others]
    found: dict[int, list[Any]] = {}
    while todo:
        there = paths.list_names(folder)
        if (whole := _remembered(file)) is not None:  # looked for after the list: it is there before that is removed
            return whole
        for unit in [unit for unit in todo if _unit_name(unit) in there]:
            if (known := _remembered(paths.join(folder, _unit_name(unit)))) is not None:
                found[unit] = known
        todo = [unit for unit in todo if unit not in found]
        if todo:
            found[todo[0]] = _read(read, units[todo[0]])
            _remember(paths.join(folder, _unit_name(todo[0])), found[todo[0]])
    return [fact for unit in range(len(units)) for fact in found[unit]]


def _published(file: str) -> str:
    return file.removesuffix(".json") + ".shared"


def _unit_name(unit: int) -> str:
    return f"{unit:05d}.json"


def _units(costs: Sequence[int]) -> list[range]:
    """The files, as ranges of their numbers of about the same cost."""
    target = max(sum(costs) / _MOST_UNITS, _UNIT)
    units, begin, cost = [], 0, 0
    for index, each in enumerate(costs):
        cost += each
        if cost >= target or index + 1 == len(costs):
            units.append(range(begin, index + 1))
            begin, cost = index + 1, 0
    return units


def _read(read: Callable[[int], Any], files: range) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        return paths.as_json(list(pool.map(read, files)))


def _remembered(file: str) -> Any:
    """What a file of JSON holds; None where there is none, or it is damaged."""
    try:
        return paths.read_json(file) if paths.exists(file) else None
    except UserError:
        return None


def _remember(file: str, found: list[Any]) -> None:
    """A cache that is complete may be read-only: then it costs another reading next time."""
    with contextlib.suppress(OSError, UserError):
        paths.write_json_if_other(file, found)
