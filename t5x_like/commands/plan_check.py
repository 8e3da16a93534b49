"""`t5x_like plan --check`: what is wrong or remarkable about a config, in seconds, without a compiler or devices.

    t5x_like plan --check --config=configs/pretrain/llama3_8b.py --topology=v5p:4x4x4
    t5x_like plan --check --config=... --json=check.json

Without --topology the run is looked at on the CPU devices that its mesh names. Exit status: 0, also with warnings; 2
where it could not start.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_like.commands import plan_file, plan_slices
from t5x_like.core import accelerators, environment
from t5x_like.core.errors import UsageError
from t5x_like.runs.arguments import ConfigParser, load_config, split_config


def run(arguments: Sequence[str]) -> int:
    config_arguments, others = split_config(arguments)
    parser = ConfigParser(prog="t5x_like plan --check", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--topology", help="such as v5p:4x4x4; default: CPU devices")
    parser.add_argument("--slices", type=int, help="of the topology; default: config.mesh.slice, or 1")
    parser.add_argument("--json", metavar="PATH", help="also write the findings as JSON")
    options = parser.parse_args(others)
    if options.slices is not None and (options.slices < 1 or (options.slices > 1 and not options.topology)):
        raise UsageError(f"--slices={options.slices} should be at least 1, and needs --topology")
    chips = accelerators.parse(options.topology) if options.topology else None
    path = plan_file.writable(options.json) if options.json else None
    config, overrides = load_config(config_arguments)
    environment.apply(dataclasses.replace(environment.READING, platform="cpu", fake_devices=0))

    from t5x_like.runs import doctor

    report = doctor.examine(config, overrides, _target(config, chips, plan_slices.of(options.slices, config)))
    if path:
        plan_file.write_json(path, _json(report))
    print(_text(report, options.topology or "CPU"))
    return UsageError.exit_status if report.errors else 0


def _target(config: Mapping[str, Any], chips: accelerators.Slice | None, slices: int) -> Any:
    from t5x_like.runs.doctor import Target
    from t5x_like.runs.findings import Place
    from t5x_like.runs.planned import named_devices

    if chips is None:
        return Target(named_devices(config), "cpu", "cpu")
    row = chips.row
    host = Place(hosts=chips.vms * slices, host_bytes=accelerators.host_bytes(chips))
    return Target(
        devices=chips.devices * slices,
        platform="tpu",
        kind=accelerators.device_kind(chips.generation),
        cores=row.cores // row.devices,
        hbm_bytes=int(row.hbm * 2**30),
        slices=slices,
        place=host,
    )


def _text(report: Any, where: str) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    counts = {level: sum(each.level == level for each in report.findings) for level in ("error", "warning", "note")}
    said = ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items())
    lines = [f"on {where}, mesh {mesh}: {said}"]
    for each in report.findings:
        lines.append(f"{each.level:<8} {each.path}: {each.what}")
        if each.remedy:
            lines.append(f"{'':<8} -> {each.remedy}")
    return "\n".join(lines)


def _json(report: Any) -> dict[str, Any]:
    return {
        "mesh": report.mesh,
        "errors": report.errors,
        "findings": [dataclasses.asdict(each) for each in report.findings],
        "memory": None if report.footprint is None else report.footprint.to_json(),
    }
