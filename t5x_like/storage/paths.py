"""Files by path, local or gs://: read, write whole or not at all, list, copy, stage. Not a general file system.

A local file is written under a temporary name in its folder, synced and renamed; an object of a bucket appears only
when its upload is complete. Files that grow (metrics.jsonl, logs) are kept in a local folder and uploaded whole.
gs:// needs the extra [gcs]; nothing of it is imported before the first such path. Paths are plain strings.
"""

import contextlib
import errno
import glob as _glob
import io
import json
import os
import posixpath
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from t5x_like.core.errors import UserError
from t5x_like.storage import bucket_file

_REMOTE = bucket_file.SCHEME
_BLOCK = 5 << 20  # bytes of a request where a file in a bucket is read piece by piece
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


def is_remote(path: str) -> bool:
    return path.startswith(_REMOTE)


def normal(path: str) -> str:
    """An absolute local path with `~` replaced, or a gs:// path without a trailing slash."""
    if is_remote(path):
        if not path[len(_REMOTE) :].strip("/"):
            raise UserError(f"{path!r} names no bucket; write gs://BUCKET/FOLDER")
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def join(root: str, *names: str) -> str:
    return "/".join([root.rstrip("/"), *names]) if is_remote(root) else os.path.join(root, *names)


def way(start: str, target: str) -> str:
    """How `target` is reached from the folder `start`, such as ../base; "" where no path between them exists."""
    if is_remote(start) != is_remote(target):
        return ""
    if is_remote(start) and start.split("/")[:3] != target.split("/")[:3]:  # another bucket
        return ""
    return posixpath.relpath(*(normal(path).removeprefix(_REMOTE.rstrip("/")) for path in (target, start)))


def along(start: str, way: str) -> str:
    """What is reached from the folder `start` by what `way` gave."""
    scheme = _REMOTE.rstrip("/") if is_remote(start) else ""
    return scheme + posixpath.normpath(posixpath.join(normal(start).removeprefix(scheme), way))


def parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0] if is_remote(path) else os.path.dirname(os.path.abspath(path))


def base_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with bucket_file.clear_errors(path):
        return bool(bucket_file.client().exists(path))


def is_directory(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    with bucket_file.clear_errors(path):
        return bool(bucket_file.client().isdir(path))


def list_names(directory: str) -> list[str]:
    """The names in a directory, sorted; empty if there is none."""
    if not is_remote(directory):
        return sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    with bucket_file.clear_errors(directory):
        files = bucket_file.client()
        if not files.isdir(directory):
            return []
        found = {base_name(entry) for entry in files.ls(directory, detail=False)}
        return sorted(found - {"", base_name(directory)})


def glob(pattern: str) -> list[str]:
    """The objects and folders of a bucket that a gs:// pattern matches."""
    with bucket_file.clear_errors(pattern):
        return [_REMOTE + name for name in bucket_file.client().glob(pattern)]


def size(path: str) -> int:
    """Bytes of a file. FileNotFoundError where there is none."""
    if not is_remote(path):
        return os.path.getsize(path)
    with bucket_file.clear_errors(path):
        return int(bucket_file.client().info(path)["size"])


def state(path: str) -> list[Any]:
    """What changes when a file does, without reading it: the size, and the time (in a bucket: the checksum)."""
    if not is_remote(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    with bucket_file.clear_errors(path):
        return _state(bucket_file.client().info(path))


def _state(facts: dict[str, Any]) -> list[Any]:
    return [facts["size"], facts.get("md5Hash") or facts.get("crc32c") or facts.get("generation")]


def states(directory: str) -> dict[str, list[Any]]:
    """The `state` of every file below a directory, by its path relative to it; in a bucket by one listing."""
    if not is_remote(directory):
        return {name: state(os.path.join(directory, *name.split("/"))) for name in tree_files(directory)}
    with bucket_file.clear_errors(directory):
        found = bucket_file.client().find(directory, detail=True)
    prefix = len(directory.rstrip("/")) + 1
    return {(_REMOTE + name)[prefix:]: _state(facts) for name, facts in sorted(found.items())}


def open_binary(path: str) -> IO[bytes]:
    """A file for reading, which can seek; one in a bucket is fetched in blocks as it is read."""
    if not is_remote(path):
        return open(path, "rb")
    with bucket_file.clear_errors(path):
        remote = bucket_file.client().open(path, "rb", block_size=_BLOCK, cache_type="readahead")
    return io.BufferedReader(bucket_file.BucketFile(remote, lambda: bucket_file.clear_errors(path)), 1 << 18)


def read_bytes(path: str) -> bytes:
    """Raises UserError where there is no such file."""
    try:
        if not is_remote(path):
            with open(path, "rb") as file:
                return file.read()
        with bucket_file.clear_errors(path):
            return bytes(bucket_file.client().cat_file(path))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read (permission denied)") from None


def read_text(path: str) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); it is damaged or no text file") from None


def read_json(path: str) -> Any:
    """Raises UserError, in one line, for a damaged file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: no JSON ({error}); restore the file from a copy, or use a new workdir"
        ) from None


def write_bytes_atomic(path: str, data: bytes) -> None:
    """Replaces the file: after a crash at any moment it holds the old bytes or the new ones."""
    if is_remote(path):
        with bucket_file.clear_errors(path, writing=True):
            bucket_file.client().pipe_file(path, data)
        return
    with _renamed_at_end(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text_atomic(path: str, text: str) -> None:
    write_bytes_atomic(path, text.encode("utf-8"))


def json_text(value: Any) -> str:
    """The text that `write_json_atomic` writes: sorted and indented, so that people and hashes can read it."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def as_json(value: Any) -> Any:
    """What comes back of a value that was written as JSON: tuples as lists, keys as text."""
    return json.loads(json_text(value))


def write_json_atomic(path: str, value: Any) -> None:
    write_text_atomic(path, json_text(value))


def write_json_if_other(path: str, value: Any) -> None:
    """Writes nothing where the file holds this already, so that a folder that is complete may be read-only."""
    with contextlib.suppress(UserError):
        if read_text(path) == json_text(value):
            return
    write_json_atomic(path, value)


def make_directory(path: str) -> None:
    """Makes a directory and its parents. Buckets have no directories: there it only checks that the bucket is there."""
    if not is_remote(path):
        try:
            os.makedirs(path, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path} cannot be a directory: a file stands there or above it") from None
        except OSError as error:
            raise UserError(f"{path} cannot be made ({error.strerror}); choose another directory") from None
        return
    with bucket_file.clear_errors(path):
        try:
            found = bool(bucket_file.client().exists(_REMOTE + bucket_file.bucket(path)))
        except FileNotFoundError:
            found = False
    if not found:
        raise bucket_file.no_bucket(path)


def remove_tree(path: str) -> None:
    """Removes a file or a directory with all it holds; fine if it is not there."""
    if is_remote(path):
        with bucket_file.clear_errors(path), contextlib.suppress(FileNotFoundError):
            _remove_objects(bucket_file.client(), path)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def rename(source: str, target: str) -> None:
    """Moves a file or directory. Atomic on a local disk; in a bucket every object is copied, then the old removed."""
    if not is_remote(source):
        os.rename(source, target)
        _sync_folder(os.path.dirname(os.path.abspath(target)))
        return
    with bucket_file.clear_errors(source):
        files = bucket_file.client()
        for name in files.find(source):
            files.cp_file(_REMOTE + name, target + (_REMOTE + name)[len(source) :])
        _remove_objects(files, source)


def copy_file(source: str, target: str) -> None:
    """Copies one file, local or not on either side; the target appears whole or not at all."""
    if is_remote(target):
        with bucket_file.clear_errors(target, writing=is_remote(target) and not is_remote(source)):
            if is_remote(source):
                bucket_file.client().cp_file(source, target)  # `copy` takes a name with [ or * for a pattern
            else:
                bucket_file.client().put_file(source, target)
        return
    with _renamed_at_end(target) as temporary:
        if is_remote(source):
            with bucket_file.clear_errors(source):
                bucket_file.client().get_file(source, temporary)
        else:
            shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())


def tree_files(directory: str) -> dict[str, int]:
    """Every file below a directory: its path relative to it, with `/`, and its size in bytes."""
    if is_remote(directory):
        with bucket_file.clear_errors(directory):
            found = bucket_file.client().find(directory, detail=True)
        prefix = len(directory.rstrip("/")) + 1
        return {(_REMOTE + name)[prefix:]: int(info["size"]) for name, info in sorted(found.items())}
    sizes = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            sizes[os.path.relpath(path, directory).replace(os.sep, "/")] = os.path.getsize(path)
    return dict(sorted(sizes.items()))


def copy_tree(source: str, target: str) -> None:
    """Copies every file below `source`; each appears whole, the tree as such is not atomic."""
    if not is_directory(source):
        raise UserError(f"{source}: no such directory")
    for name in tree_files(source):
        copy_file(join(source, name), join(target, name))


@contextlib.contextmanager
def local_copy(directory: str) -> Iterator[str]:
    """A local directory with the files of `directory`: itself, or a copy of a gs:// folder that lives as long."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="t5x_like-copy-") as folder:
        copy_tree(directory, folder)
        yield folder


class StagedDirectory:
    """A directory that is written locally (TensorBoard events); `upload` puts its changed files to their place."""

    def __init__(self, path: str):
        self.path = path
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._uploaded: dict[str, tuple[int, int]] = {}
        if is_remote(path):
            self._folder = tempfile.TemporaryDirectory(prefix="t5x_like-staged-")
            self.local_path = self._folder.name
        else:
            make_directory(path)
            self.local_path = path

    def upload(self) -> None:
        if self._folder is None:
            return
        for name in tree_files(self.local_path):
            source = os.path.join(self.local_path, name)
            status = os.stat(source)
            state = (status.st_size, status.st_mtime_ns)
            if self._uploaded.get(name) != state:
                copy_file(source, join(self.path, name))
                self._uploaded[name] = state

    def close(self) -> None:
        self.upload()
        if self._folder is not None:
            self._folder.cleanup()


@contextlib.contextmanager
def _renamed_at_end(path: str) -> Iterator[str]:
    """A temporary name beside `path` that becomes `path` if the body ends well, and vanishes if not."""
    temporary = f"{path}.tmp.{socket.gethostname()}.{os.getpid()}"
    try:
        with writing(path):
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            yield temporary
            os.replace(temporary, path)
            _sync_folder(os.path.dirname(os.path.abspath(path)))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Makes one line, which names the file, of a full disk or a missing right inside."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise UserError(f"{path} cannot be written ({error.strerror}); free disk space or check permissions") from None


def _sync_folder(folder: str) -> None:
    """A rename is on the disk only when its folder is."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_objects(files: Any, path: str) -> None:
    """Removes what lies at and below a gs:// path; one with [ or * in it the client would take for a pattern."""
    if not _glob.has_magic(path):
        files.rm(path, recursive=True)
        return
    for name in files.find(path):
        files.rm_file(name)
