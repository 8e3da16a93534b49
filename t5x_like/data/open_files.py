"""Files that stay open for reading, so many at most: large sources have more shards than a process may open."""

import collections
import os
import resource
import threading
from collections.abc import Callable, Iterable

_MANY_FILES = 4096  # where a process may open any number


class OpenFiles:
    """At most `limit` files open for reading: those that were read last. Safe from several threads.

    Files are closed when nobody refers to them any more, so none is closed under a thread that reads from it.
    """

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._files: collections.OrderedDict[str, OpenFile] = collections.OrderedDict()  # read last: at the end

    def get(self, path: str) -> "OpenFile":
        """The open file; hold it while reading, no longer. OSError where it cannot be opened."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
        opened = OpenFile(os.open(path, os.O_RDONLY))  # without the lock: on a shared disk this takes long
        with self._lock:
            file = self._files.setdefault(path, opened)  # of two threads that opened it the first one's is kept
            if len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file

    def close(self, paths: Iterable[str]) -> None:
        """Closes these; the others stay open."""
        with self._lock:
            for path in paths:
                self._files.pop(path, None)


class OpenFile:
    """A file descriptor, closed with the last reference to this."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit, `os` may be gone
        close(self.descriptor)


def open_files() -> OpenFiles:
    """For all token sets of a process: half of the files it may have open, as others need some too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OpenFiles(_MANY_FILES if limit == resource.RLIM_INFINITY else max(limit // 2, 1))
