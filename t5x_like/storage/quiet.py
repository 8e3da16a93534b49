"""Keeps Orbax from telling a failure in hundreds of lines, which we tell in one. It hides nothing else.

A failed read or write is raised to us; besides, Orbax logs the traceback, and Python prints what became of the other
coroutines when they are collected. Both name every array of the checkpoint.
"""

import logging
import sys
from typing import Any

_TEMPORARY = ".orbax-checkpoint-tmp/"  # in every path of an unfinished checkpoint


def quiet_orbax() -> None:
    """Drops Orbax's own log lines and the remains of its coroutines. Calling it again changes nothing."""
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_of_orbax)
    before = sys.unraisablehook
    if getattr(before, "quiet_orbax", False):
        return

    def hook(unraisable: Any) -> None:
        if not _remains(unraisable.object, unraisable.exc_value):
            before(unraisable)

    hook.quiet_orbax = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _not_of_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return "orbax" not in record.pathname and not (record.name == "asyncio" and _remains(None, error))


def _remains(thing: Any, error: BaseException | None) -> bool:
    code = getattr(thing, "cr_code", None)
    if code is not None and "orbax" in code.co_filename:
        return True
    # TensorStore's answers to an event loop that Orbax closed at the first failure, and further failures of that save.
    if isinstance(error, RuntimeError) and str(error) == "Event loop is closed" or _TEMPORARY in str(error):
        return True
    return _raised_in_orbax(error)


def _raised_in_orbax(error: BaseException | None) -> bool:
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        if "orbax" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False
