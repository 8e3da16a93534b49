"""Estimated beside published step times: how far `t5x_like plan` can be trusted, by rows that others measured.

    python -m tools.calibrate --compile            # each program of a row that is not there yet: minutes of a CPU each
    python -m tools.calibrate --table              # what docs/planner.md shows; seconds, nothing is compiled
    python -m tools.calibrate --fit                # constants fitted to the rows, beside those in force

Programs are kept in ~/.cache/t5x_like/calibration; --compile needs the extra [tpu]. Rows and their sources: rows.py.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from t5x_like.core.config import nearest
from t5x_like.core.errors import UsageError, UserError
from tools.calibrate import applying, compiling, table
from tools.calibrate.programs import BY_NAME, PROGRAMS
from tools.calibrate.rows import ROWS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.calibrate", description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--compile", nargs="*", metavar="PROGRAM", help="compile these programs, or those of rows that are missing"
    )
    what.add_argument("--table", action="store_true", help="print estimated beside published")
    what.add_argument("--fit", action="store_true", help="print fitted constants")
    parser.add_argument("--kept", metavar="DIR", type=pathlib.Path, default=compiling.folder(), help="of programs")
    options = parser.parse_args(arguments)
    if options.compile is not None:
        return _compile(options.compile, options.kept)
    found = _applied(options.kept)
    rows = [row for row in ROWS if all(name in found for name in row.programs)]
    if not rows:
        raise UsageError(f"{options.kept} holds no program of a row; run --compile first")
    timed = table.Timed(rows, [[found[name] for name in row.programs] for row in rows])
    if options.fit:
        print(table.fitted(timed))
        return 0
    print(table.to_markdown(timed, missing=[row for row in ROWS if row not in rows]))
    return 0


def _compile(names: Sequence[str], where: pathlib.Path) -> int:
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"--compile {name}: there is no such program; {nearest(name, BY_NAME)}")
    failed = 0
    of_rows = dict.fromkeys(name for row in ROWS for name in row.programs)
    for program in [BY_NAME[name] for name in names or of_rows]:
        if compiling.read(program, where) is not None:
            continue
        print(f"compiling {program.name}", file=sys.stderr)
        try:
            compiling.compile_and_keep(program, where)
        except UserError as error:  # one program that does not fit does not hide the others
            failed += 1
            print(f"{program.name}: {error}", file=sys.stderr)
    return int(failed > 0)


def _applied(where: pathlib.Path) -> dict[str, applying.Applied]:
    """The programs that are kept, ready to be timed."""
    kept = [(program, compiling.read(program, where)) for program in PROGRAMS]
    return {program.name: applying.read(program, content) for program, content in kept if content}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
