"""Command lines: `--config=FILE[:ARG] --config.a.b=VALUE` through ml_collections, the rest through argparse.

Wrong use becomes one line and exit status 2. What the config means is decided in experiment.py.
"""

import argparse
import pathlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from t5x_like.core.errors import UsageError

# What the flags raise for a wrong override, and a config file for a mistake in it.
_FLAG_ERRORS = (flags.Error, AttributeError, ImportError, KeyError, NameError, TypeError, ValueError, SyntaxError)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; --help says more")


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
    values = flags.FlagValues()
    line = ["t5x_like", *arguments]
    given = _config_dict(stored)
    try:
        config_flags.DEFINE_config_dict("config", given, flag_values=values, sys_argv=line, lock_config=True)
        values(line)
    except _FLAG_ERRORS as error:
        raise UsageError(_explain(error, None, arguments)) from None
    config: Any = values["config"].value
    return config.to_dict(), config_flags.get_override_values(values["config"])


def _config_dict(stored: Mapping[str, Any]) -> ConfigDict:
    """JSON has lists where configs have tuples, and None where they have a type that waits for its value."""

    def frozen(value: Any) -> Any:
        if value is None:
            return placeholder(object)  # any literal; core/config.py checks its type
        if isinstance(value, Mapping):
            return {key: frozen(item) for key, item in value.items()}
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    return ConfigDict(frozen(stored))


def load_config(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config that `--config=...` names with its overrides applied, and {dotted path: value} of these."""
    files = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    if len(files) != 1:
        raise UsageError("give one --config=FILE[:ARG], for example --config=configs/pretrain/tiny.py")
    path = pathlib.Path(files[0].partition(":")[0])
    if not path.is_file():
        raise UsageError(f"--config={files[0]}: {path} is no file; the shipped ones are under configs/")
    _make_importable(path)
    values = flags.FlagValues()
    line = ["t5x_like", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=line, lock_config=True)
    try:
        values(line)
        config = values["config"].value
    except _FLAG_ERRORS as error:
        raise UsageError(_explain(error, path, arguments)) from None
    if not isinstance(config, ConfigDict):
        raise UsageError(f"{path}: get_config() should return a ConfigDict, not {type(config).__name__}")
    return config.to_dict(), config_flags.get_override_values(values["config"])


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section that a command needs before anything else is looked at."""
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise UsageError(f"config.{name} is missing; start the config from configs/common.py")
    return found


def _make_importable(path: pathlib.Path) -> None:
    """Lets a config say `from configs import common`, from wherever the command is started."""
    for folder in path.resolve().parents:
        if (folder / "configs" / "common.py").is_file():
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return


def _explain(error: Exception, path: pathlib.Path | None, arguments: Sequence[str]) -> str:
    """One line for what went wrong: the place in the config file if it raised, else the override at fault."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if path and pathlib.Path(frame.filename).resolve() == path.resolve():
            return f"{path}:{frame.lineno}: {type(error).__name__}: {_line(error)}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {_line(error)}"
    text = _line(error)
    names = {argument: argument.partition("=")[0].lstrip("-").removeprefix("config.") for argument in arguments}
    at_fault = [each for each, name in names.items() if name in text or f'"{name.rpartition(".")[2]}"' in text]
    return f"{at_fault[0] if at_fault else path or 'config'}: {text}"


def _line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if len(text) > 1 and text[0] == text[-1] == "'" and "\\n" in text:  # repr of the text of an error within an error
        text = text[1:-1].replace("\\n", " ").replace("\\'", "'")
    return " ".join(text.split())
