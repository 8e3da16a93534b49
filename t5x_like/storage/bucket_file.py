"""Files in a bucket: their client, its errors in one line, and a file as a stream that can seek."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

from t5x_like.core.errors import UserError

SCHEME = "gs://"
_CREDENTIALS = "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS naming a key file"


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


def client() -> Any:
    """The file system object for gs://, the very one that Orbax uses, so that their caches of listings are one."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError:
        raise UserError("gs:// paths need the extra gcs: pip install 't5x_like[gcs]'") from None
    # Both warn about each bucket whose storage layout may not be asked for, an emulator's included; and what gcsfs logs
    # as an error, over a hundred lines, it raises too.
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    files = fsspec.filesystem("gcs", finalize_on_close=True)
    files.invalidate_cache()
    return files


@contextlib.contextmanager
def clear_errors(path: str, *, writing: bool = False) -> Iterator[None]:
    """Turns what the client of the bucket raises into one line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        if writing:
            raise no_bucket(path) from None
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        code = str(getattr(error, "code", None))
        kind = f"{type(error).__module__}.{type(error).__name__}"
        if code in ("401", "403") or "Forbidden" in text or kind.startswith("google.auth."):
            raise UserError(f"{path}: access refused ({text}); give credentials: {_CREDENTIALS}") from None
        if isinstance(error, OSError) or kind.startswith(("aiohttp.", "gcsfs.", "requests.")):
            raise UserError(f"{path}: the bucket cannot be reached ({type(error).__name__}: {text})") from None
        raise


def bucket(path: str) -> str:
    return path[len(SCHEME) :].partition("/")[0]


def no_bucket(path: str) -> UserError:
    return UserError(
        f"{path}: there is no bucket {bucket(path)!r}, or it may not be seen; create it "
        f"(`gcloud storage buckets create gs://{bucket(path)}`) or give credentials: {_CREDENTIALS}"
    )
