"""python -m tools.lifecycle: runs the stages of a lifecycle, then writes report.md and report.html into its folder.

    python -m tools.lifecycle                                       into runs/lifecycle
    python -m tools.lifecycle --config=configs/lifecycle/tiny.py:t5 into runs/lifecycle_t5
    python -m tools.lifecycle --config=FILE[:ARG] --folder=DIR

Stages whose commands and inputs have not changed are skipped. Exit status 75: it was asked to stop and has saved;
start it again, as after any end. docs/lifecycle.md says more.
"""

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Sequence

import t5x_like
from t5x_like.core.errors import UsageError, UserError
from tools.lifecycle import page, runner, stages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.lifecycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/lifecycle/tiny.py", help="FILE[:ARG] with get_stages")
    parser.add_argument("--folder", default="", help="where all of it lies (runs/lifecycle, or runs/lifecycle_ARG)")
    options = parser.parse_args(arguments)
    chosen = re.sub(r"\W+", "_", options.config.partition(":")[2])
    folder = options.folder or "_".join(["runs/lifecycle", *filter(None, [chosen])])
    try:
        graph = stages.read(options.config, folder)
        runner.run(graph, folder)
        table = report(graph, folder)
    except runner.Stopped:
        print("lifecycle: asked to stop; start it again to go on", file=sys.stderr)
        return runner.PREEMPTED
    except (UsageError, UserError) as error:
        print(f"lifecycle: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"\n{table}\n{os.path.join(folder, 'report.html')}")
    return 0


def report(graph: Sequence[stages.Stage], folder: str) -> str:
    """Writes the table and the page; the table."""
    table = page.rows(graph, {stage.name: runner.record_of(stage, folder) for stage in graph})
    facts = [
        f"{time.strftime('%Y-%m-%d %H:%M')}, {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, t5x_like {t5x_like.__version__}"
    ]
    text = page.markdown(table)
    for name, content in (("report.md", text), ("report.html", page.page("A lifecycle", graph, table, facts))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(content)
    return text


if __name__ == "__main__":
    sys.exit(main())
