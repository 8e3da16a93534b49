"""A file in a bucket as a stream that can seek."""

import contextlib
import io
from collections.abc import Callable
from typing import Any


class BucketFile(io.RawIOBase):
    """What fsspec opened, with errors in one line. `clear` gives the context that turns them into one."""

    def __init__(self, file: Any, clear: Callable[[], contextlib.AbstractContextManager[None]]):
        self._file, self._clear = file, clear

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._clear():
            return int(self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
