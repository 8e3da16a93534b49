"""What judges one answer: plain functions (prompt, answer, expected) -> number, by kind, and where a config's own
function is found again in another process. Standard library only: a worker starts with nothing else."""

import dataclasses
import fractions
import hashlib
import importlib
import importlib.machinery
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

Verifier = Callable[[str, str, str], float]
# Digits with commas between groups of three, or without; a fraction or a decimal part; a power of ten of few digits,
# whose number has a size that a comparison can bear.
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:/\d+|(?:\.\d+)?(?:(?<=\d)[eE][-+]?\d{1,3}(?!\w))?)")


@dataclasses.dataclass(frozen=True)
class Named:
    """A function of a config file: the file, the name of its module where that can be imported, its own name."""

    path: str
    module: str
    name: str

    def load(self) -> Callable[..., Any]:
        if self.module:
            found: Any = importlib.import_module(self.module)
        else:
            loader = importlib.machinery.SourceFileLoader("config_file", self.path)
            found = types.ModuleType(loader.name)
            found.__file__ = self.path
            sys.modules[loader.name] = found
            loader.exec_module(found)
        return getattr(found, self.name)


def named(function: Callable[..., Any]) -> tuple[str, Named]:
    """(what a config stores of a function: file, name, and a digest of its source; how to find it).

    Raises ValueError for one that no other process can find: a lambda, a method, a function within a function.
    """
    name, path = getattr(function, "__qualname__", ""), inspect.getsourcefile(function) or ""
    if not name.isidentifier() or not path:
        raise ValueError(f"{name or function!r} should be a function at the top level of a file")
    module = function.__module__
    importable = sys.modules.get(module) is not None and sys.modules[module].__spec__ is not None
    digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
    found = Named(os.path.abspath(path), module if importable else "", name)
    return f"{os.path.basename(path)}:{name}@{digest}", found


def exact(prompt: str, answer: str, expected: str) -> float:
    """
    >>> exact("", " 12 ", "12"), exact("", "twelve", "12")
    (1.0, 0.0)
    """
    del prompt
    return float(answer.strip() == expected.strip())


def number(prompt: str, answer: str, expected: str) -> float:
    """
    >>> number("", "so 1,250 of them, or 5/2", "2.50"), number("", "none", "3"), number("", "1e5", "100,000")
    (1.0, 0.0, 1.0)
    """
    del prompt
    given, wanted = last_number(answer), last_number(expected)
    if wanted is None:
        raise ValueError(f"the expected answer {expected!r:.80} holds no number")
    return float(given == wanted)


def last_number(text: str) -> fractions.Fraction | None:
    for found in reversed(_NUMBER.findall(text)):
        try:
            return fractions.Fraction(found.replace(",", ""))
        except (ValueError, ZeroDivisionError):
            continue
    return None


def regex(pattern: str) -> Verifier:
    """
    >>> regex(r"answer: (?P<answer>\\d+)")("", "the answer: 12.", "12")
    1.0
    """
    compiled = re.compile(pattern)

    def verify(prompt: str, answer: str, expected: str) -> float:
        del prompt
        found = compiled.search(answer)
        if found is None:
            return 0.0
        return 1.0 if "answer" not in compiled.groupindex else float(found["answer"] == expected.strip())

    return verify


def make(kind: str, pattern: str, function: Mapping[str, str] | None) -> Verifier:
    """The verifier of a part of the reward; `function` are the fields of a Named."""
    if function is not None:
        return Named(**function).load()
    return regex(pattern) if kind == "regex" else {"exact": exact, "number": number}[kind]
