"""The content of a source file as a stream: local or in a bucket, decompressed by what its first bytes say.

Nothing is staged on a disk: a file in a bucket is read in blocks of 5 MiB as it is used. gzip, zstd and bzip2 go
through pyarrow, xz through the standard library; members and frames that follow each other are one content.
"""

import io
import lzma
from typing import IO, Any

from t5x_like.core.errors import UserError
from t5x_like.storage import paths

_BUFFER = 1 << 18
_SKIP = 1 << 22
_TAR_HEADER = 512
_ARCHIVES = ((b"PK\x03\x04", "zip"), (b"7z\xbc\xaf", "7z"), (b"Rar!", "rar"))


def compression(path: str) -> str:
    """The compression of a file: "gzip", "zstd", "bz2" or "xz"; "" for none. UserError for a kind of archive."""
    with paths.open_binary(path) as file:
        head = file.read(10)
    return _compression(head, path)


def _compression(head: bytes, path: str) -> str:
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        return "bz2"
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    for magic, name in _ARCHIVES:
        if head.startswith(magic):
            raise UserError(f"{path}: is a {name} archive; expected text, plain or .gz, .zst, .bz2 or .xz; unpack it")
    return ""


def open_content(path: str) -> IO[bytes]:
    """The decompressed content from its begin. Only plain content can seek: use `skip`."""
    file = paths.open_binary(path)
    kind = _compression(file.read(10), path)
    file.seek(0)
    if not kind:
        return file
    return io.BufferedReader(_Decompressed(file, kind, path), _BUFFER)


def skip(file: IO[bytes], count: int) -> None:
    """Goes to byte `count` of a stream that stands at its begin, or to its end."""
    if file.seekable():
        file.seek(count)
        return
    while count and (got := len(file.read(min(count, _SKIP)))):
        count -= got


def length(path: str) -> int:
    """Bytes of the content: of a compressed file it is read through."""
    if not compression(path):
        return paths.size(path)
    with open_content(path) as file:
        buffer, total = memoryview(bytearray(_SKIP)), 0
        while got := file.readinto(buffer):  # type: ignore[attr-defined]
            total += got
        return total


def is_tar(path: str) -> bool:
    """Whether the content is a tar archive. No text has the zeros that fill its header."""
    with open_content(path) as file:
        head = file.read(_TAR_HEADER)
    return len(head) == _TAR_HEADER and head[257:262] == b"ustar" and b"\0" in head


class _Decompressed(io.RawIOBase):
    """A stream of decompressed bytes whose errors name the file."""

    def __init__(self, file: IO[bytes], kind: str, path: str):
        self._file, self._kind, self._path = file, kind, path
        self._stream: Any = None
        if kind == "xz":
            self._stream = lzma.LZMAFile(file)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(file, kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except (OSError, EOFError, lzma.LZMAError) as error:
            reason = " ".join(str(error).split())[:100]
            raise UserError(
                f"{self._path}: its {self._kind} data is damaged or cut off ({reason}); copy or write the file again"
            ) from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()
