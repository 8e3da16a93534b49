"""Imports go down only, and the other rules of docs/architecture.md that can be read off the source. Runs no code."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "t5x_like"

# A module may import from strictly lower floors or from its own folder.
FLOORS = (
    ("core",),
    ("parallel",),
    ("storage",),
    ("layers", "data", "optim"),
    ("models",),
    ("objectives", "peft", "compress", "convert", "inference"),
    ("training",),
    ("rl", "evaluation", "serving"),
    ("planner",),
    ("runs", "language_model"),
    ("commands",),
    ("__main__", "__init__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# What stands outside of the package calls a run as a whole, and the command line; what launches runs also reads their
# workdirs, and a tool may make the mesh for it.
OUTSIDE = {"configs": (), "launch": (2, 9, 10, 11), "tools": (1, 9, 10, 11)}
# Measurements reach for the part that they measure.
MEASURES = (
    "tools/benchmark/",
    "tools/calibrate/",
    "tools/gpu_report.py",
    "tools/gpu_work.py",
    "tools/lifecycle/judge.py",
)
# Files that speak of this process and not of a mesh.
PROCESS = {
    f"t5x_like/{name}.py" for name in ("core/environment", "parallel/multihost", "training/session", "runs/loading")
}
TENSORFLOW = ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text")


def sources(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, folders
    return found


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path, *, package="t5x_like"):
    """(line, full dotted name, whether inside a function) of every import, relative ones resolved."""
    tree = parsed(path)
    inside = {id(node) for body in ast.walk(tree) if isinstance(body, FUNCTIONS) for node in ast.walk(body)}
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}", id(node) in inside


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def unit(path):
    """The folder or single module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def places(paths, bad):
    """`file:line` of everything that `bad(path)` yields."""
    return [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in bad(path)]


def test_every_folder_of_the_package_has_a_floor():
    units = {unit(path) for path in sources("t5x_like")}
    assert units <= set(FLOOR), sorted(units - set(FLOOR))


def test_imports_go_down_only():
    def bad(path):
        own = unit(path)
        for line, name, _ in imports(path):
            if name.split(".")[0] == "t5x_like" and name != "t5x_like.__version__":
                other = name.split(".")[1] if "." in name else "__init__"
                if other == "configs" and own == "commands":
                    continue  # the usual values, which a command hands on
                # The modules of one folder know each other, those at the root of a floor too.
                beside = other == own or (FLOOR.get(other) == FLOOR[own] and (PACKAGE / f"{own}.py").exists())
                if not beside and FLOOR.get(other, len(FLOORS)) >= FLOOR[own]:
                    yield line

    assert places(sources("t5x_like"), bad) == []


def test_a_floor_violation_would_be_seen(tmp_path, monkeypatch):
    module = PACKAGE / "core" / "made_up.py"
    tree = ast.parse("def f():\n    from t5x_like.models.model import Model\n    return Model\n")
    monkeypatch.setitem(globals(), "parsed", lambda path: tree)
    assert list(imports(module)) == [(2, "t5x_like.models.model.Model", True)]


@pytest.mark.parametrize("folder", OUTSIDE)
def test_what_stands_outside_calls_the_upper_floors_only(folder):
    def bad(path):
        if path.relative_to(ROOT).as_posix().startswith(MEASURES):
            return
        for line, name, _ in imports(path):
            parts = name.split(".")
            if parts[0] == "t5x_like" and len(parts) > 1 and parts[1] not in ("core", "configs"):
                if FLOOR.get(parts[1], -1) not in OUTSIDE[folder]:
                    yield line

    if any((ROOT / folder).rglob("*.py")):
        assert places(sources(folder), bad) == []


def test_data_is_numpy_alone():
    def bad(path):
        yield from (line for line, name, _ in imports(path) if name.split(".")[0] in ("jax", "flax", "optax"))

    assert places(sources("t5x_like/data"), bad) == []


def test_tensorflow_is_imported_by_source_adapters_only_and_late():
    def bad(path):
        for line, name, inside in imports(path):
            if name.split(".")[0] in TENSORFLOW and not (inside and unit(path) == "data"):
                yield line

    assert places(sources("t5x_like"), bad) == []


def test_torch_is_imported_only_to_verify_a_conversion():
    def bad(path):
        if path.match("convert/verify.py"):
            return
        yield from (line for line, name, _ in imports(path) if name.split(".")[0] in ("torch", "transformers"))

    assert places(sources("t5x_like"), bad) == []


def test_nnx_is_a_notation_of_layers_and_models():
    def bad(path):
        if unit(path) not in ("layers", "models"):
            yield from (line for line, name, _ in imports(path) if name.split(".")[0] == "flax")

    assert places(sources("t5x_like"), bad) == []


def dotted(node):
    """`jax.lax.scan` for that chain of attributes, a bare name for a name, "" for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (("jax.value_and_grad", "value_and_grad"), {"t5x_like/training/step.py"}),  # one train step
        (("jax.make_mesh", "jax.sharding.Mesh", "Mesh"), {"t5x_like/parallel/mesh.py"}),  # one maker of meshes
        (("jax.default_backend",), PROCESS),  # says "cpu" while lowering for a TPU: kernels and formats ask the mesh
        (("nnx.vmap", "nnx.scan", "nnx.List"), set()),  # a stack is the vmap of one layer's pure functions
        (("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "eval", "exec"), set()),
    ],
)
def test_what_has_one_place_is_called_nowhere_else(names, allowed):
    def bad(path):
        if path.relative_to(ROOT).as_posix() not in allowed:
            calls = (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call))
            yield from (call.lineno for call in calls if dotted(call.func) in names)

    assert places(sources("t5x_like"), bad) == []


def test_help_and_import_wait_for_no_heavy_library():
    heavy = ("jax", "flax", "numpy", "tensorflow", "torch", "tensorboardX", "matplotlib", "pyarrow")
    program = (
        "import sys, t5x_like, t5x_like.__main__ as main\n"
        "assert main.main(['--help']) == 0\n"
        f"print(*(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage:") and done.stderr.split() == []
