"""One writer for one workdir. A local lock belongs to the process and ends with it, however it ends.

Local: `flock` on the file `lock`, which also tells host and process. gs:// has no locks: there the file `lock.json` is
rewritten every few seconds, and a newcomer watches whether that goes on (no clocks of two hosts are compared); two
that start within the same second are not told apart.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from t5x_like.core.errors import UserError
from t5x_like.storage import paths

LOCAL_NAME, REMOTE_NAME = "lock", "lock.json"


@contextlib.contextmanager
def locked(workdir: str, *, beat_seconds: float = 15.0) -> Iterator[None]:
    """Holds the lock of a workdir. Raises UserError, naming the holder, if another process has it.

    On gs:// a lock whose holder died without releasing it is taken over after three beats in which it did not change.
    """
    if paths.is_remote(workdir):
        with _remote_lock(workdir, beat_seconds):
            yield
    else:
        with _local_lock(workdir):
            yield


@contextlib.contextmanager
def _local_lock(workdir: str) -> Iterator[None]:
    # Unix only, as are the fork-free process groups that the rest of the program relies on.
    import fcntl

    path = os.path.join(workdir, LOCAL_NAME)
    with paths.writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(workdir, _parsed(os.read(descriptor, 4096))) from None
        except OSError:
            # A network file system without locks: what the file says has to do.
            holder = _parsed(os.read(descriptor, 4096))
            if holder and not _is_dead(holder):
                raise _refusal(workdir, holder) from None
        with paths.writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_myself("")).encode(), 0)
        yield
        # Emptied, not removed: a name that another process has open must go on meaning this lock.
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _remote_lock(workdir: str, beat_seconds: float) -> Iterator[None]:
    path = paths.join(workdir, REMOTE_NAME)
    token = secrets.token_hex(8)
    holder = _held(path)
    if holder and not _is_dead(holder):
        _wait_for_silence(workdir, path, holder, beat_seconds)
    stop = threading.Event()

    def write(count: int) -> None:
        paths.write_bytes_atomic(path, json.dumps({**_myself(token), "beat": count}).encode())

    def beat() -> None:
        count = 0
        while not stop.wait(beat_seconds):
            count += 1
            # One that fails is followed by another; the lock is no reason to end a run.
            with contextlib.suppress(UserError, OSError):
                write(count)

    write(0)
    thread = threading.Thread(target=beat, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(UserError, OSError):
            if (_held(path) or {}).get("token") == token:
                paths.remove_tree(path)


def _wait_for_silence(workdir: str, path: str, holder: dict[str, Any], beat_seconds: float) -> None:
    """Returns when the lock has not changed for three beats, or is gone; raises when it beats."""
    print(f"{workdir} was left locked by {_name(holder)}; waiting {3 * beat_seconds:.0f} s to see whether it is alive")
    end = time.monotonic() + 3 * beat_seconds
    while time.monotonic() < end:
        time.sleep(min(beat_seconds / 3, 2.0))
        now = _held(path)
        if not now:
            return
        if now != holder:
            raise _refusal(workdir, now)


def _held(path: str) -> dict[str, Any] | None:
    return _parsed(paths.read_bytes(path)) if paths.exists(path) else None


def _myself(token: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "token": token,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
    }


def _started(pid: int) -> str:
    """When a process of this host started, in its kernel's ticks: a number that a later process has not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder is a process of this host that is no more. Of other hosts we know nothing."""
    if holder.get("host") != socket.gethostname():
        return False
    pid = int(holder.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _started(pid) != holder.get("started", "")


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        holder = json.loads(data)
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _name(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _refusal(workdir: str, holder: dict[str, Any] | None) -> UserError:
    return UserError(f"{workdir} is in use by {_name(holder)}; wait for it, end it, or use another --workdir")
