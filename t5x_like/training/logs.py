"""Where the log messages of all components go during a run: a file for each process, warnings to the terminal too.

Components say `logging.getLogger(__name__)` and nothing else. Not here: metrics, which are rows and no messages.
"""

import contextlib
import logging

from t5x_like.core.terminal import StatusLine

_PACKAGE = "t5x_like"


def open_logs(path: str, line: StatusLine) -> list[logging.Handler]:
    """The handlers of the package's logger, in force until `close_logs`; warnings go above the live `line`."""
    file = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file, _LineHandler(line)]
    package = logging.getLogger(_PACKAGE)
    package.setLevel(logging.INFO)
    # Libraries give the root logger handlers of their own, which would print every line a second time.
    package.propagate = False
    for handler in handlers:
        package.addHandler(handler)
    return handlers


def close_logs(handlers: list[logging.Handler]) -> None:
    package = logging.getLogger(_PACKAGE)
    package.propagate = True
    for handler in handlers:
        package.removeHandler(handler)
        with contextlib.suppress(OSError):  # as handleError below
            handler.close()


class _LineHandler(logging.Handler):
    def __init__(self, line: StatusLine):
        super().__init__(logging.WARNING)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line.print(self.format(record))


class _FileHandler(logging.FileHandler):
    """A log that stays silent when it cannot be written (a full disk): it must not end what it reports on."""

    def handleError(self, record: logging.LogRecord) -> None:  # the library says the name
        pass
