"""Writes what a search found as a config file beside its own: the base config with some fields set."""

import datetime
import json
import keyword
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections.config_flags import config_path

from t5x_like.core import accelerators
from t5x_like.core.errors import UserError
from t5x_like.core.terminal import format_bytes
from t5x_like.planner.search.index import Entry
from t5x_like.planner.topology import Topology, compiler_version
from t5x_like.runs.arguments import call_function, config_file, load_config
from t5x_like.storage import paths

_SHIPPED = pathlib.Path(__file__).resolve().parents[1] / "configs"


def pinned_path(arguments: Sequence[str], given: str, *, topology: str) -> pathlib.Path:
    """Where the config will lie: at `given`, or beside the base, llama3_8b_v5p_128.py. UserError if one is there."""
    base, _ = config_file(arguments)
    asked = accelerators.parse(topology)
    alone = len(accelerators.slices_named(asked.name)) == 1
    name = re.sub(r"[^a-z0-9]+", "_", (asked.name if alone else asked.spelled).lower())
    target = pathlib.Path(paths.normal(given)) if given else base.with_name(f"{base.stem}_{name}.py")
    if target.suffix != ".py":
        raise UserError(f"--pin={given}: a config is a Python file; give a path that ends with .py")
    if target.exists():
        raise UserError(f"--pin: {target} is there already; delete it, or give --pin=FILE")
    if not target.parent.is_dir():
        raise UserError(f"--pin={given}: {target.parent} is no folder")
    return target


def write_pinned(target: pathlib.Path, arguments: Sequence[str], best: Entry, place: Topology) -> None:
    """Writes the config whole or not at all. arguments: the `--config...` ones, whose overrides it holds too.

    Raises UserError, and writes nothing, where the file would not be the config with these overrides and the best.
    """
    base, given = config_file(arguments)
    wanted, values = load_config([*arguments, *best.point.flags])
    launches, _ = call_function(arguments, "get_launch")
    text = _text(target, base, given, values, best, place, launches=launches)
    # Beside the target, since the base may be found by its place.
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.stem}.", suffix=".py") as trial:
        trial.write(text)
        trial.flush()
        try:
            found, _ = load_config([f"--config={trial.name}"])
            call_function([f"--config={trial.name}"], "get_launch")
        except UserError as error:
            reason = str(error).replace(trial.name, target.name)
            raise UserError(f"--pin: {target} would not load ({reason}); use best.flags instead") from None
    if found != wanted:
        raise UserError(f"--pin: {target} would not be the config with its overrides; use best.flags instead")
    paths.write_text_atomic(str(target), text)


def _text(
    target: pathlib.Path,
    base: pathlib.Path,
    given: Sequence[str],
    values: Mapping[str, Any],
    best: Entry,
    place: Topology,
    *,
    launches: bool,
) -> str:
    verdict = best.best
    assert verdict is not None
    topology, slices = place.name, f" --slices={place.slices}" if place.slices > 1 else ""
    items = json.dumps({"topology": topology} | ({"slices": place.slices} if slices else {}))
    launch = f"base.get_launch() | {items}" if launches else items
    memory, version = format_bytes(verdict.bytes), compiler_version()
    called = f"base.get_config({', '.join(map(repr, given))})"
    return f'''"""{base.name} for {topology}, as `t5x_like plan --search` chose it on {datetime.date.today()}.

    t5x_like plan --config={_shown(target)} --topology={topology}{slices}
Hardware: {place.slices} x {topology}.
Estimated, not measured (libtpu {version}): {verdict.seconds:.3g} s a step, {memory} of a device.
"""

{_imports(base, target)}

def get_config() -> ConfigDict:
    config = {called}
{chr(10).join(_assignment(path, value) for path, value in values.items()) or "    # The config as it is."}
    return config


def get_launch():
    return {launch}
'''


def _imports(base: pathlib.Path, target: pathlib.Path) -> str:
    """How the base is reached: a shipped config by its name, another one by its place beside the new file."""
    path = base.resolve()
    if path.is_relative_to(_SHIPPED.resolve()):
        folder = ".".join(path.parent.relative_to(_SHIPPED.resolve()).parts)
        module = f"t5x_like.configs.{folder}" if folder else "t5x_like.configs"
        return f"from ml_collections import ConfigDict\n\nfrom {module} import {path.stem} as base\n"
    way = paths.way(str(target.parent), str(path)) or str(path)
    return (
        "import pathlib\nimport runpy\nimport types\n\nfrom ml_collections import ConfigDict\n\n"
        f'_BASE = pathlib.Path(__file__).parent / "{way}"\n'
        "base = types.SimpleNamespace(**runpy.run_path(str(_BASE)))\n"
    )


def _assignment(path: str, value: Any) -> str:
    """
    >>> _assignment("model.remat", "dots")
    '    config.model.remat = "dots"'
    """
    reached = "config"
    keys = config_path.split(path.removeprefix("config."))
    for depth, key in enumerate(keys, start=1):
        plain = isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)
        # The keys of compiler options are made as they come, which only an item can be.
        made = depth == len(keys) and "compiler_options" in keys
        reached += f".{key}" if plain and not made else f"[{_literal(key)}]"
    return f"    {reached} = {_literal(value)}"


def _literal(value: Any) -> str:
    """As a Python file says it; a JSON text is one of Python too, in double quotes and with escapes.

    >>> _literal('a"b'), _literal((1, None))
    ('"a\\\\"b"', '(1, None)')
    """
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _shown(path: pathlib.Path) -> str:
    try:
        return str(path.resolve().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(path)
