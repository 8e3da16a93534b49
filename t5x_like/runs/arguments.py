"""Command lines: `--config=FILE[:ARG] --config.a.b=VALUE` through ml_collections, the rest through argparse.

Wrong use becomes one line and exit status 2. What the config means is decided in runs/train.py.
"""

import argparse
import collections
import difflib
import importlib.machinery
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import config_path

from t5x_like.core.config import nearest, open_sections
from t5x_like.core.environment import RuntimeConfig
from t5x_like.core.errors import UsageError
from t5x_like.data.config import DataConfig
from t5x_like.storage import paths, patterns

# Sections whose keys a run names itself, and what their values are. No other section class has any, and these import
# no array library, which must wait until the environment stands.
_OPEN = {
    **dict(open_sections(DataConfig, prefix="data.")),
    **dict(open_sections(RuntimeConfig, prefix="runtime.")),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors: one line, exit status 2. A flag that is none is named before anything
    that is missing, which may be what it was meant to be."""

    other_flags: tuple[str, ...] = ()  # that are taken out before parsing

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        for argument in sys.argv[1:] if args is None else args:
            if argument == "--":
                break
            name = argument.partition("=")[0]
            if re.fullmatch(r"-{1,2}[A-Za-z]\S*", name) and not self._is_flag(name):
                hint = nearest(name.partition(".")[0], [*self._long(), *self.other_flags])
                raise UsageError(f"{self.prog}: {argument}: there is no flag {name}; {hint}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; --help says more")

    def _is_flag(self, name: str) -> bool:
        """As argparse reads it: a flag, the beginning of one, or -x with its value."""
        known = self._option_string_actions
        return any(flag.startswith(name) for flag in known) or (name[:2] in known and name[1] != "-")

    def _long(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


class ConfigParser(Parser):
    """Of a command that takes a config too: see `split_config`."""

    other_flags = ("--config",)


def split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the `--config...` arguments, the others); `--config FILE` is accepted like `--config=FILE`."""
    chosen, others = [], []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name = argument.partition("=")[0]
        if name == "--config" or name.startswith("--config."):
            if "=" not in argument:
                if not remaining:
                    raise UsageError(f"{argument} needs a value: {argument}=VALUE")
                argument = f"{argument}={remaining.pop(0)}"
            chosen.append(argument)
        else:
            others.append(argument)
    return chosen, others


def override(stored: Mapping[str, Any], arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stored config with the overrides `--config.a.b=VALUE` applied, and {dotted path: value} of these."""
    return _apply(_config_dict(stored), arguments, where="config.json")


def load_config(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config that `--config=...` names with its overrides applied, and {dotted path: value} of these."""
    path, given = config_file(arguments)
    found, config = _call(path, "get_config", *given)
    if not found:
        raise UsageError(f"{path} has no function get_config(); see configs/pretrain/tiny.py")
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{path}: get_config() should return a ConfigDict, not {type(config).__name__}")
    overrides = [argument for argument in arguments if not argument.startswith("--config=")]
    return _apply(config, overrides, where=str(path))


def call_function(arguments: Sequence[str], name: str, *given: Any) -> tuple[bool, Any]:
    """(whether the config file has a function `name` beside its get_config, such as `sweep`; what that gives).

    Raises UsageError, with file and line, for whatever it raises.
    """
    path, _ = config_file(arguments)
    return _call(path, name, *given)


def config_file(arguments: Sequence[str]) -> tuple[pathlib.Path, list[str]]:
    """(the file that `--config=FILE[:ARG]` names, what its get_config is given)."""
    files = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    if len(files) != 1:
        raise UsageError("give one --config=FILE[:ARG], for example --config=configs/pretrain/tiny.py")
    if paths.is_remote(files[0]):
        raise UsageError(f"--config={files[0]}: a config is a program and is read from a disk; copy it there")
    name, colon, text = files[0].partition(":")
    path = pathlib.Path(patterns.one(name, what="--config=")).expanduser()
    return path if path.is_file() else _shipped(name), [text] if colon else []


def _shipped(name: str) -> pathlib.Path:
    """The config that comes with the program under this name: tiny, pretrain/tiny or configs/pretrain/tiny.py."""
    known = {
        f"{path.parent.name}/{path.stem}": path
        for path in sorted(pathlib.Path(__file__).parents[1].joinpath("configs").glob("*/*.py"))
        if path.parent.name != "common" and "\ndef get_config(" in path.read_text("utf-8")
    }
    short = name.removeprefix("configs/").removesuffix(".py")
    found = [each for each in known if short in (each, each.partition("/")[2])]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise UsageError(f"--config={name} names several shipped configs; use {' or '.join(found)}")
    stems = collections.Counter(each.partition("/")[2] for each in known)
    unique = {each: each if stems[each.partition("/")[2]] > 1 else each.partition("/")[2] for each in known}
    close = difflib.get_close_matches(short, sorted({*known, *stems}), n=1)
    meant = [shown for each, shown in unique.items() if close and close[0] in (each, each.partition("/")[2])]
    hint = f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"known: {', '.join(unique.values())}"
    raise UsageError(f"--config={name}: there is no file {name}, and no shipped config; {hint}")


def _config_dict(stored: Mapping[str, Any]) -> ConfigDict:
    """JSON has lists where configs have tuples, and None where they have a type that waits for its value."""

    def frozen(value: Any) -> Any:
        if value is None:
            return placeholder(object)  # any literal; core/config.py checks its type
        if isinstance(value, Mapping):
            return {key: frozen(item) for key, item in value.items()}
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(frozen(stored))


def _call(path: pathlib.Path, name: str, *given: Any) -> tuple[bool, Any]:
    """(whether the file has this function, what it gives). ml_collections' own loader hides some errors."""
    _make_importable(path)
    loader = importlib.machinery.SourceFileLoader("config_file", str(path))
    module = types.ModuleType(loader.name)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses of the file look for their module there
    try:
        loader.exec_module(module)
        function: Any = getattr(module, name, None)
        return (True, function(*given)) if callable(function) else (False, None)
    except UsageError:
        raise
    except Exception as error:  # whatever a file may do wrong
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "configs":
            hint = "; write `from t5x_like.configs import common`, which works from any folder"
        place = _place(error, path, getattr(module, name, None))
        raise UsageError(f"{place}: {type(error).__name__}: {_line(error)}{hint}") from None


def _place(error: Exception, path: pathlib.Path, function: Any) -> str:
    """FILE:LINE of an error: the innermost line of the config file, else that of the function, else the file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno or 1}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if pathlib.Path(frame.filename).resolve() == path.resolve():
            return f"{path}:{frame.lineno}"
    code = getattr(function, "__code__", None)
    return f"{path}:{code.co_firstlineno if code else 1}"


def _apply(config: ConfigDict, arguments: Sequence[str], *, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config with the overrides, and {dotted path: value} of these; every wrong one is a UsageError."""
    values = flags.FlagValues()
    line = ["t5x_like", *arguments]
    _refuse_doubles(arguments)
    try:
        for argument in arguments:
            _admit(config, argument)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line, lock_config=True)
        values(line)
        chosen: Any = values["config"].value
        return chosen.to_dict(), config_flags.get_override_values(values["config"])
    except UsageError:
        raise
    except Exception as error:  # flags.Error, and whatever a value raises on its way into a ConfigDict
        raise UsageError(_explain(error, arguments, where)) from None


def _refuse_doubles(arguments: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for argument in arguments:
        before = seen.setdefault(argument.partition("=")[0], argument)
        if before != argument:
            raise UsageError(f"{before} and {argument}: an override is given twice with two values; give it once")


def _admit(config: ConfigDict, argument: str) -> None:
    """Gives an open section the key that an override names; refuses an override of what is not there."""
    dotted = argument.partition("=")[0].removeprefix("--config.")
    try:
        keys = config_path.split(dotted)
    except Exception:
        raise UsageError(f"{argument}: {dotted!r} is no path{_spelling(argument)}") from None
    holder: Any = config
    for depth, key in enumerate(keys):
        if not isinstance(holder, ConfigDict):
            return  # into a tuple: ml_collections knows
        kind = _OPEN.get(".".join(map(str, keys[:depth])))
        if re.search(r"[.\s]", str(key)):
            plain = argument.replace(str(key), re.sub(r"[.\s]", "_", str(key)))
            raise UsageError(f"{argument}: the key {key!r} has dots or blanks, which no key may have; write {plain}")
        if kind is not None and depth == len(keys) - 1:
            _open(holder, key, kind)
        elif key not in holder:
            where = ".".join(map(str, ("config", *keys[: depth + 1])))
            raise UsageError(f"{argument}: {where} is unknown{f'; {nearest(str(key), holder)}' if len(holder) else ''}")
        holder = holder[key]


def _spelling(argument: str) -> str:
    """How a path with a key that is no word, such as a-b, is written."""
    dotted, _, value = argument.removeprefix("--config.").partition("=")
    section, _, key = dotted.rpartition(".")
    if not key or '"' in dotted or "'" in dotted or not section:
        return '; write a key that is no word as SECTION["KEY"]'
    return f"""; write '--config.{section}["{"_".join(key.split())}"]={value}'"""


def _open(section: Any, key: str, kind: type) -> None:
    """Makes `section.key` a place for a value of the kind that all values of the section have."""
    with section.unlocked():
        if key not in section:
            section[key] = placeholder(kind)
        elif kind is float and type(section[key]) is int:
            with section.ignore_type():
                section[key] = float(section[key])


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section that a command needs before anything else is looked at."""
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise UsageError(f"config.{name} is missing; start the config from configs/common")
    return found


def _make_importable(path: pathlib.Path) -> None:
    """Lets a config say `from configs import common`, from wherever the command is started."""
    for folder in path.resolve().parents:
        if (folder / "configs" / "common").is_dir():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return


def _explain(error: Exception, arguments: Sequence[str], where: str) -> str:
    """One line for what went wrong with the overrides, with the one at fault where it can be told."""
    text = _line(error)
    names = {argument: argument.partition("=")[0].removeprefix("--config.") for argument in arguments}
    at_fault = [each for each, name in names.items() if name in text or f'"{name.rpartition(".")[2]}"' in text]
    if not at_fault:
        return f"{where}: {type(error).__name__}: {text}"  # a value that is computed from others, for one
    return f"{at_fault[0]}: {text.removeprefix(f'flag {at_fault[0]}: ')}"


def _line(error: Exception) -> str:
    """The text of an error in one line, without its kind and place."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(error.msg if isinstance(error, SyntaxError) else text).split())
