"""Every shipped config on a small slice of TPUs: whose lowered program is not that of its last plan is planned anew.

Lowering takes a second or two a config and needs no TPU compiler. tests/golden/plans.json holds a fingerprint of each
program and the figures of its plan; T5X_LIKE_UPDATE_GOLDEN=1 plans what has changed and writes it. `make nightly` plans
them all (marker slow).
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from t5x_like.__main__ import main
from t5x_like.core import accelerators
from t5x_like.parallel import mesh as meshes
from t5x_like.planner.fingerprint import fingerprint
from t5x_like.runs import program as programs
from t5x_like.runs import rl_program
from t5x_like.runs.arguments import load_config
from t5x_like.runs.planned import experiment_of
from t5x_like.runs.rl_program import RlExperiment
from t5x_like.runs.roles import open_or_assume

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "plans.json"
UPDATE = bool(os.environ.get("T5X_LIKE_UPDATE_GOLDEN"))
FOLDERS = ("pretrain", "instruct", "preference", "distill", "rl")
SHIPPED = sorted(
    f"{folder}/{path.stem}"
    for folder in FOLDERS
    for path in (ROOT / "configs" / folder).glob("*.py")
    if "\ndef get_config(" in path.read_text("utf-8")
)
# Compilers' texts differ between versions: fingerprints and figures are of these.
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINNED = dict(line.split("==") for line in LINES if line.startswith(("jax==", "libtpu==")))
# A slice as small as the program allows, and what makes a large model fit into it: depth and rows change neither the
# layers' program nor its axes. Configs that are not named are planned as they are on one of 4 chips.
TOPOLOGY, LARGE = "v5e:2x2", "v5e:2x4"
_SHALLOW = {"model.decoder.layers": 2, "data.batch_size": 16}
# Attention without a kernel takes minutes to compile as wide as it is.
_NARROW = {"model.width": 1024, "data.batch_size": 32}
_NARROW |= {
    "model.encoder.layers": 2,
    "model.encoder.heads": 16,
    "model.encoder.kv_heads": 16,
    "model.encoder.mlp": 2560,
}
_NARROW |= {
    "model.decoder.layers": 2,
    "model.decoder.heads": 16,
    "model.decoder.kv_heads": 16,
    "model.decoder.mlp": 2560,
}
SMALL: dict[str, tuple[str, dict[str, int | str]]] = {
    "distill/test": (TOPOLOGY, {"roles.teacher.source": "/nowhere/teacher"}),  # like the student, on every machine
    "instruct/llama3_8b_chat": (LARGE, _SHALLOW),
    "instruct/llama3_8b_lora": (LARGE, _SHALLOW),
    "pretrain/llama3_405b": ("v5e:4x8", _SHALLOW | {"data.batch_size": 32}),
    "pretrain/llama3_70b": (LARGE, _SHALLOW | {"data.batch_size": 8}),
    "pretrain/llama3_8b": (LARGE, _SHALLOW),
    "pretrain/llama3_8b_128k": (LARGE, _SHALLOW | {"data.batch_size": 4, "data.length": 8192, "mesh.sequence": 2}),
    "pretrain/t5_xxl": (LARGE, _NARROW),
    "rl/llama3_8b_grpo": (
        LARGE,
        _SHALLOW
        | {"data.batch_size": 32, "rl.prompts": 16, "rl.samples": 4, "roles.reference.source": "/nowhere/reference"},
    ),
}


def arguments(name):
    """(topology, the `--config...` arguments of its small form)."""
    topology, changes = SMALL.get(name, (TOPOLOGY, {}))
    overrides = [f"--config.{path}={value}" for path, value in changes.items()]
    return topology, [f"--config={ROOT / 'configs' / name}.py", *overrides]


def mark(name):
    """The fingerprint of all programs of a config."""
    topology, given = arguments(name)
    experiment = experiment_of(*load_config(given))
    chips = accelerators.parse(topology)
    sizes = meshes.axis_sizes(experiment.mesh, chips.devices)
    mesh = meshes.abstract(sizes, platform="tpu", kind=accelerators.device_kind(chips.generation))
    built = programs.step_program(experiment, mesh, opened=open_or_assume(experiment.model, {}))
    found = [(built.step, (built.layout.state, built.layout.frozen, built.batch))]
    if isinstance(experiment, RlExperiment):
        found = [(stage.step, stage.arguments) for stage in rl_program.stages(experiment, built)]
    return fingerprint(found, mesh, experiment.runtime.compiler_options.of("tpu") or {})


def figures(plan):
    """What is kept of the JSON of a plan: {figure: number}, for one device."""
    found = {}
    for program in plan.get("programs") or [plan]:
        prefix = f"{program['program']} " if "programs" in plan else ""
        memory = program["memory"]
        for part in ("arguments", "temporaries"):
            found[f"{prefix}{part}_bytes"] = memory[f"{part}_bytes"]
        found[f"{prefix}cycles"] = program["cycles"]
        for total in program["collectives"]:
            key = f"{prefix}{total['kind']} over {' x '.join(total['axes']) or 'none'}, bytes"
            found[key] = found.get(key, 0) + total["bytes"]
    return found


def planned(name, folder):
    """The figures of a plan that is made now. With the compiler's own options: those of the large configs make it take
    minutes more, and what moved shows without them."""
    topology, given = arguments(name)
    path = folder / "plan.json"
    kept = [] if UPDATE else [f"--cache={folder}"]
    assert main(["plan", *given, f"--topology={topology}", f"--json={path}", "--default_options", *kept]) == 0
    return figures(json.loads(path.read_text()))


def moved(before, now, *, least=0.001):
    """Words for each figure that is not what it was, by more than a share."""
    words = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, 0), now.get(key, 0)
        if abs(new - old) > least * max(old, new):
            words.append(f"{key} {old:.4g} -> {new:.4g}" + (f" ({new / old - 1:+.1%})" if old else ""))
    return words


def golden():
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"versions": PINNED, "plans": {}}


def write(name, entry):
    content = golden()
    content["versions"] = PINNED
    content["plans"] = {each: plan for each, plan in content["plans"].items() if each in SHIPPED}
    content["plans"] = dict(sorted({**content["plans"], name: entry}.items()))
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


def needs_pinned(*packages):
    for package in packages:
        found = importlib.util.find_spec(package) and importlib.metadata.version(package)
        if found != PINNED[package]:
            pytest.skip(f"plans in tests/golden are of {package} {PINNED[package]}, and here is {found or 'none'}")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_program_that_changed_is_planned(name, tmp_path):
    needs_pinned("jax")
    now, last = mark(name), golden()["plans"].get(name)
    if last and last["fingerprint"] == now:
        return
    needs_pinned("libtpu")
    found = planned(name, tmp_path)
    if UPDATE:
        write(name, {"fingerprint": now, "topology": arguments(name)[0], "figures": found})
        return
    said = moved(last["figures"], found) if last else ["it has no plan yet"]
    pytest.fail(
        f"{name} is lowered to another program: {'; '.join(said) or 'no figure of its plan moved'}. If that is meant: "
        f"T5X_LIKE_UPDATE_GOLDEN=1 pytest tests/planner/test_shipped.py -k {name}",
        pytrace=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_plan_has_the_figures_that_are_kept(name, tmp_path):
    needs_pinned("jax", "libtpu")
    assert moved(golden()["plans"][name]["figures"], planned(name, tmp_path)) == []


def test_no_plan_is_kept_of_a_config_that_is_gone():
    assert golden()["plans"].keys() == set(SHIPPED)


@pytest.mark.parametrize("name", ["pretrain/llama3_8b", "preference/dpo"])
def test_a_fingerprint_is_that_of_another_process_from_another_folder(tmp_path, name):
    """With other hashes of strings, and the checkout under another path: of a program with kernels of attention, and of
    one that joins arrays by their names."""
    needs_pinned("jax")
    os.symlink(ROOT, tmp_path / "elsewhere")
    code = f"from tests.planner.test_shipped import mark; print(mark({name!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(tmp_path / "elsewhere")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split()[-1:] == [mark(name)], run.stderr[-2000:]


def test_a_fingerprint_tells_programs_and_options_apart():
    needs_pinned("jax")

    def of(*overrides):
        experiment = experiment_of(*load_config([f"--config={ROOT / 'configs/pretrain/test.py'}", *overrides]))
        mesh = meshes.abstract(meshes.axis_sizes(experiment.mesh, 4), platform="tpu", kind="TPU v5 lite")
        built = programs.step_program(experiment, mesh)
        step = (built.step, (built.layout.state, built.layout.frozen, built.batch))
        return fingerprint([step], mesh, experiment.runtime.compiler_options.of("tpu") or {})

    option = '--config.runtime.compiler_options.tpu["xla_tpu_scoped_vmem_limit_kib"]=65536'
    marks = [of(), of("--config.model.remat=full"), of("--config.model.decoder.mlp=72"), of(option)]
    assert len(set(marks)) == len(marks)
    assert of("--config.loop.steps=7", "--config.seed=0") == of("--config.loop.steps=7")


def test_what_moved_is_said_in_words():
    before = {"cycles": 1000, "temporaries_bytes": 10**9, "all-gather over fsdp, bytes": 5}
    now = {"cycles": 1100, "temporaries_bytes": 10**9 + 1, "all-reduce over fsdp, bytes": 7}
    assert moved(before, now) == [
        "all-gather over fsdp, bytes 5 -> 0 (-100.0%)",
        "all-reduce over fsdp, bytes 0 -> 7",
        "cycles 1000 -> 1100 (+10.0%)",
    ]
