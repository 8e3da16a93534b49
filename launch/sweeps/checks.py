"""What is looked at before the first member starts: every point and config, and whether two are the same run."""

import json
from collections.abc import Mapping
from typing import Any

from launch import check
from launch.job import Job
from launch.sweeps.index import Entry, Index
from launch.sweeps.pool import gpus
from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from t5x_like.runs.arguments import load_config


def settle(found: Index) -> dict[str, int]:
    """Notes the steps of each member in the index; the length of each one's schedule.

    Raises UsageError, with the member, for a field that the config has not, or a value that it does not take.
    """
    schedules = {}
    for entry in found:
        try:
            config, _ = load_config((*found.settings.config, *entry.member.overrides))
            for path, value in entry.member.point.items():
                _check_taken(config, path, value)
            steps = int(config["loop"]["steps"])
            schedules[entry.name] = config["optim"]["schedule"]["steps"] or steps
        except UserError as error:
            raise UsageError(f"{entry.member.described}: {error}") from None
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"{entry.member.described}: config.loop.steps or config.optim.schedule is missing"
            ) from None
        found.add(entry.member, steps)
    if found.settings.halving and len({entry.steps for entry in found}) > 1:
        first, other = next((one, two) for one in found for two in found if one.steps != two.steps)
        raise UsageError(
            f"--halving compares members of equal steps; {first.name} has {first.steps} and {other.name} {other.steps}"
        )
    return schedules


def check_members(found: Index, jobs: Mapping[str, Job]) -> None:
    """Raises UsageError, with the member, for one that could not start, or that is the same run as another."""
    here = found.settings.target == "local"
    first = next(iter(jobs.values()))
    place = check.HERE if here else check.place_of(first, target=found.settings.target)
    # As a member sees it: its variables, and the GPUs of the first one.
    environment = {**first.environment, **gpus(0, found.settings.gpus_each)} if here else {}
    runs = [check.Run(jobs[name].config, jobs[name].workdir if here else "") for name in found.names]
    verdicts = dict(zip(found.names, check.check(runs, place, environment), strict=True))
    wrong = [entry for entry in found if verdicts[entry.name].problem]
    if wrong:
        more = f" (and {len(wrong) - 1} more members)" if len(wrong) > 1 else ""
        raise UsageError(f"{wrong[0].member.described}: {verdicts[wrong[0].name].problem}{more}")
    seen: dict[str, Entry] = {}
    for entry in found:
        mark = json.dumps(verdicts[entry.name].config, sort_keys=True, default=repr)
        same = seen.setdefault(mark, entry)
        if same is not entry:
            raise UsageError(f"{same.member.described} and {entry.member.described} are the same run; leave one out")
        _check_metric(entry, found.settings.metric, verdicts[entry.name])


def _check_taken(config: Mapping[str, Any], path: str, value: Any) -> None:
    """The config must hold what the point says: an override is a text, which may mean something else."""
    node: Any = config
    for part in path.removeprefix("config.").split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    wanted = list(value) if isinstance(value, list | tuple) else value
    taken = list(node) if isinstance(node, list | tuple) else node
    if taken != wanted and str(taken) != str(wanted):
        raise UsageError(f"{path}={value!r} becomes {node!r} in the config; give a value of its type")


def _check_metric(entry: Entry, metric: str, verdict: check.Verdict) -> None:
    """What is judged must be measured; of training and of rewards only a run itself can say."""
    part, _, rest = metric.partition("/")
    data = verdict.config["data"]
    if part != "eval" or "rl" in verdict.config:
        return
    if not data["validation"]:
        raise UsageError(f"--metric={metric}: {entry.member.described} holds nothing out (config.data.validation)")
    measured = [*verdict.metrics, *(["perplexity"] if "loss" in verdict.metrics else [])]
    name = rest.partition("/")[2]
    if name not in measured:
        raise UsageError(f"--metric={metric} is not measured by {entry.member.described}; {nearest(name, measured)}")
