"""Files and functions stay small: a newcomer meets the largest ones. Divide a file, do not raise a limit."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("t5x_like", "configs", "launch", "tools", "tests")
FILE_LINES = 600
PREFERRED_FILE_LINES = 400
FUNCTION_LINES = 60
CONFIG_LINES = 150
# The loop is read from top to bottom, as one story.
LONG_FUNCTIONS = {"t5x_like/training/loop.py": "train"}
FORBIDDEN_NAMES = ("utils", "util", "helpers", "helper", "misc")


def files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name(path):
    return path.relative_to(ROOT).as_posix()


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_longer_than_the_limit_and_few_are_near_it():
    sizes = {name(path): lines(path) for path in files(*FOLDERS)}
    assert {path: size for path, size in sizes.items() if size > FILE_LINES} == {}
    long = {path: size for path, size in sizes.items() if size > PREFERRED_FILE_LINES}
    assert len(long) <= len(sizes) // 20, long


def function_lines(node):
    """Lines of a function without its docstring and its signature, so that saying more is never punished."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return node.end_lineno - body[0].lineno + 1 if body else 0


def test_functions_fit_on_a_screen():
    found = {}
    for path in files("t5x_like", "configs", "launch", "tools"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) > FUNCTION_LINES:
                if LONG_FUNCTIONS.get(name(path)) != node.name:
                    found[f"{name(path)}:{node.lineno} {node.name}"] = function_lines(node)
    assert found == {}


def test_configs_stay_short_enough_to_read():
    sizes = {name(path): lines(path) for path in files("configs")}
    assert {path: size for path, size in sizes.items() if size > CONFIG_LINES} == {}


def test_modules_are_named_for_what_they_hold():
    paths = [path for path in files(*FOLDERS) if path.stem in FORBIDDEN_NAMES or path.stem == "common"]
    assert [name(path) for path in paths] == []
