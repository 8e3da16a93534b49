"""The process environment of a run: threads, fake devices, compilation cache, quiet logs. Standard library only.

`apply` runs before jax is imported and speaks to it through environment variables; where jax is imported already
it sets the same values on `jax.config`, and refuses what comes too late. Not here: joining processes
(parallel/multihost.py) and the limits at work (training/faults.py); only their numbers are.
"""

import contextlib
import ctypes
import dataclasses
import glob
import hashlib
import importlib.metadata
import os
import platform as host
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from t5x_like.core.errors import UsageError

_CACHE_ENTRY = "*-cache"
_TCACHE = "glibc.malloc.tcache_count"
_DAMAGED_ENTRY = re.compile(r"Error reading persistent compilation cache entry for '([^']+)'")


@dataclasses.dataclass(frozen=True)
class PhaseSeconds:
    """How long each phase of a run may go without a sign of progress; seconds, 0 for no limit."""

    start: float
    compile: float
    step: float
    evaluate: float
    save: float


@dataclasses.dataclass(frozen=True)
class CompilerOptions:
    """For each platform the options given to `jax.jit(compiler_options=...)`; their names are XLA's."""

    cpu: dict[str, bool | int | float | str]
    gpu: dict[str, bool | int | float | str]
    tpu: dict[str, bool | int | float | str]

    def of(self, platform: str) -> dict[str, bool | int | float | str] | None:
        """Those of a platform as jax names it, None if there are none."""
        return getattr(self, platform, None) or None


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """What a run asks of its process; none of it changes the mathematics, though `threads` changes the last bits.

    platform: "cpu", "gpu", "tpu", or "" for what jax finds
    threads: threads of XLA on the CPU, 0 for one per core
    fake_devices: CPU devices to pretend, 0 for what is there
    compiler_options: see CompilerOptions
    heartbeat_seconds: jax's own limit for a silent process; ours is a third of it, and speaks first
    shutdown_seconds: how long the first process to finish waits for the others
    phase_seconds: limits of the watchdog
    compilation_cache: "auto" (the user's cache folder), "off", or a folder, which may be gs://
    compilation_cache_bytes: the oldest entries go when the folder is larger at start; 0 for no limit
    """

    platform: str
    threads: int
    fake_devices: int
    compiler_options: CompilerOptions
    heartbeat_seconds: int
    shutdown_seconds: int
    phase_seconds: PhaseSeconds
    compilation_cache: str
    compilation_cache_bytes: int

    def check(self, path: str) -> None:
        if self.platform not in ("", "cpu", "gpu", "tpu"):
            raise UsageError(f"{path}.platform={self.platform!r} should be 'cpu', 'gpu', 'tpu' or ''")
        for name in ("threads", "fake_devices", "compilation_cache_bytes"):
            if getattr(self, name) < 0:
                raise UsageError(f"{path}.{name}={getattr(self, name)} should not be negative")
        if self.heartbeat_seconds < 10:
            raise UsageError(
                f"{path}.heartbeat_seconds={self.heartbeat_seconds} should be at least 10; processes write a "
                "heartbeat every second and are missed after a third of this"
            )
        if self.shutdown_seconds < 1:
            raise UsageError(f"{path}.shutdown_seconds={self.shutdown_seconds} should be at least 1")
        for field in dataclasses.fields(PhaseSeconds):
            seconds = getattr(self.phase_seconds, field.name)
            if seconds < 0:
                raise UsageError(f"{path}.phase_seconds.{field.name}={seconds:g} should not be negative; 0 is none")
        if self.fake_devices and self.platform not in ("", "cpu"):
            raise UsageError(
                f"{path}.fake_devices={self.fake_devices} needs {path}.platform='cpu', not {self.platform!r}"
            )


@dataclasses.dataclass(frozen=True)
class Environment:
    """What is in force after `apply`. `notes` are lines for the start-up summary; `threads` goes into the manifest."""

    threads: int
    compilation_cache: str | None
    notes: tuple[str, ...]


# Commands that only read a model: the machine as it is, compiled programs kept. The options are those of
# configs/common, and what uses a model from Python (language_model.py) compiles with them too.
READING = RuntimeConfig(
    platform="",
    threads=0,
    fake_devices=0,
    compiler_options=CompilerOptions(
        cpu={"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}, gpu={}, tpu={}
    ),
    heartbeat_seconds=100,
    shutdown_seconds=300,
    phase_seconds=PhaseSeconds(start=0, compile=0, step=0, evaluate=0, save=0),
    compilation_cache="auto",
    compilation_cache_bytes=0,
)


def cores() -> int:
    """The cores this process may run on, which is also what XLA counts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply(config: RuntimeConfig, *, recorded_threads: int | None = None) -> Environment:
    """Sets up this process; calling it again with the same config changes nothing.

    `recorded_threads` is the thread count in the manifest of the run that is resumed: it is used again unless the
    config names another one. Raises UsageError when jax has started already with other settings.
    """
    config.check("config.runtime")
    notes: list[str] = []
    threads = _threads(config, recorded_threads, notes)
    _set_threads(threads)
    if config.fake_devices:
        _set_fake_devices(config.fake_devices)
    if config.platform:
        _set_platform("cuda" if config.platform == "gpu" else config.platform)
    elif _spared():
        _set_platform("cpu")
    _keep_memory()
    _quiet()
    cache = _set_cache(config, threads, notes)
    return Environment(threads=threads, compilation_cache=cache, notes=tuple(notes))


# Threads.


def _threads(config: RuntimeConfig, recorded: int | None, notes: list[str]) -> int:
    """The thread count to use, in this order: config, recorded, environment, cores."""
    given = os.environ.get("NPROC", "")
    chosen = config.threads or recorded or (int(given) if given.isdigit() else 0) or cores()
    if recorded and chosen != recorded:
        notes.append(
            f"config.runtime.threads={chosen}, but this run was started with {recorded}: the bits of its losses will "
            "differ from an uninterrupted run (0 takes the recorded number)"
        )
    elif recorded and not config.threads and chosen != cores():
        notes.append(f"{chosen} threads as at the first start, for equal bits (this process has {cores()} cores)")
    return chosen


def _set_threads(threads: int) -> None:
    # XLA reads NPROC once, when it makes its CPU thread pools.
    if _jax_has_started() and str(threads) != os.environ.get("NPROC", str(cores())):
        raise UsageError(
            f"config.runtime.threads={threads}, but this process has started jax with "
            f"{os.environ.get('NPROC', cores())}; start a new process"
        )
    os.environ["NPROC"] = str(threads)


# Devices. JAX_* variables are read when jax is imported, so an imported jax is told through its config.


def _set_fake_devices(count: int) -> None:
    if _jax_has_started():
        devices = len(_jax().devices("cpu"))
        if devices != count * _jax().process_count():
            raise UsageError(
                f"config.runtime.fake_devices={count}, but this process has started jax with {devices} CPU devices; "
                "start a new process"
            )
        return
    # The older way to ask for devices; jax refuses both at once.
    rest = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    if rest:
        os.environ["XLA_FLAGS"] = " ".join(rest)
    else:
        os.environ.pop("XLA_FLAGS", None)
    _set("jax_num_cpu_devices", count)
    _set_platform("cpu")


def spare_search() -> None:
    """For a program that uses us as a library: as `apply` chooses the platform, and nothing else of the process."""
    if "jax" in sys.modules and _spared():
        _jax().config.update("jax_platforms", "cpu")


def _spared() -> bool:
    """Whether jax is kept from looking for an accelerator where there is none and nobody has chosen a platform.

    A machine that only has libtpu installed, for the planner, would search for a TPU, and print seven lines about it.
    """
    chosen = os.environ.get("JAX_PLATFORMS") or ("jax" in sys.modules and _jax().config.jax_platforms)
    return not chosen and not _jax_has_started() and not _has_accelerator()


def _set_platform(platform: str) -> None:
    if _jax_has_started():
        found = _jax().default_backend()
        if found != {"cuda": "gpu"}.get(platform, platform):
            raise UsageError(
                f"config.runtime.platform={platform!r}, but this process has started jax on {found!r}; "
                "start a new process"
            )
        return
    _set("jax_platforms", platform)


def _has_accelerator() -> bool:
    """Whether this machine has the device files of a TPU or a GPU."""
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd"))


def _keep_memory() -> None:
    """Keeps freed memory in the process (glibc only).

    XLA allocates every temporary of a CPU program anew at each step; given back to the system in between, each page is
    faulted in again, which took a third of the time of a step. All three settings are needed, before threads start.

    The price: the process holds its temporaries twice, since those of a step are allocated just before the last step's
    are freed; up to five times with an older glibc that has its tcache (`restart_without_tcache`).
    """
    if not sys.platform.startswith("linux") or _jax_has_started() or _has_accelerator():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    no_mmap, no_trim, one_arena = (-4, 0), (-1, -1), (-8, 1)
    for parameter, value in (no_mmap, no_trim, one_arena):
        mallopt(parameter, value)


def restart_without_tcache() -> None:
    """Runs this command anew in the same process, with glibc's cache of small blocks off; at most once.

    Before glibc 2.39 what is cut off an aligned block may stay in that cache, the block does not fit into its own hole
    again (bug 30723), and ever more of XLA's temporaries lie side by side: 14 GB were held where 6 are needed, each
    new one at the price of half a step. glibc reads the setting at the start of a process only. For the command line,
    before anything is imported; on a CPU alone.
    """
    kind, version = host.libc_ver()
    given = os.environ.get("GLIBC_TUNABLES", "")
    old = kind == "glibc" and tuple(map(int, version.split(".")[:2])) < (2, 39)
    if not old or _TCACHE in given or _has_accelerator():
        return
    tunables = ":".join(filter(None, (given, f"{_TCACHE}=0")))
    with contextlib.suppress(OSError):  # where that may not be, the run goes on with the memory it takes
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": tunables})


def _quiet() -> None:
    """Errors stay; information and warnings of TensorFlow, XLA and gRPC are for their authors."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


# The persistent compilation cache.


def cache_folder(threads: int) -> Path:
    """Where compiled programs are kept: one folder for each CPU, number of threads and version that compiles for them.

    A program for another CPU may hold instructions this one lacks, hence the feature flags in the name. A CPU program
    is cut into as many pieces as there were threads and cores when it was compiled, which jax's own key leaves out.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    versions = "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
    features = hashlib.sha256(_cpu_features().encode()).hexdigest()[:8]
    return Path(home) / "t5x_like" / "compiled" / f"{versions}-{host.machine()}-{features}-{threads}of{cores()}"


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return host.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), host.processor())


def _set_cache(config: RuntimeConfig, threads: int, notes: list[str]) -> str | None:
    """The folder in force, or None. A folder that cannot be made costs compile time, never the run."""
    if config.compilation_cache == "off":
        _set("jax_enable_compilation_cache", False)
        return None
    folder = config.compilation_cache
    if folder == "auto":
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder(threads))
    if "://" not in folder:
        folder = os.path.abspath(os.path.expanduser(folder))
        try:
            # Programs in it are run: nobody else may write it.
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError as error:
            notes.append(f"no compilation cache: {folder}: {error.strerror}")
            _set("jax_enable_compilation_cache", False)
            return None
        if config.compilation_cache_bytes:
            _prune(Path(folder), config.compilation_cache_bytes)
        _delete_damaged_entries(Path(folder))
    _set("jax_enable_compilation_cache", True)
    _set("jax_compilation_cache_dir", folder)
    _set("jax_persistent_cache_min_compile_time_secs", 0)
    _set("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _prune(folder: Path, limit: int) -> None:
    """Deletes the entries not used for longest until the folder is at most `limit` bytes."""
    entries = []
    for path in folder.glob(_CACHE_ENTRY):
        try:
            status = path.stat()
        except OSError:  # another process prunes too
            continue
        entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(entry[1] for entry in entries)
    for _, entry_size, path in sorted(entries):
        if size <= limit:
            return
        path.unlink(missing_ok=True)
        size -= entry_size


class _Showwarning:
    """Shows a warning as before, and deletes the cache entry that it calls damaged.

    jax warns, compiles anew and then finds the damaged file in its way, so it would warn for ever. The message names
    the compiled function, with which the names of all its entries begin.
    """

    def __init__(self, folder: Path, before: Any) -> None:
        self.folder = folder
        self.before = before

    def __call__(self, message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None):
        damaged = _DAMAGED_ENTRY.match(str(message))
        if damaged is None:
            self.before(message, category, filename, lineno, file, line)
            return
        name = damaged.group(1)
        for path in self.folder.glob(f"{glob.escape(name)}-*"):
            path.unlink(missing_ok=True)
        print(f"t5x_like: damaged entry of the compilation cache deleted: {self.folder}/{name}-*", file=sys.stderr)


def _delete_damaged_entries(folder: Path) -> None:
    shown: Any = warnings.showwarning
    before = shown.before if isinstance(shown, _Showwarning) else shown
    warnings.showwarning = _Showwarning(folder, before)


# What jax knows.


def _set(name: str, value: bool | int | str) -> None:
    """Sets a jax option where jax will look for it: the environment, and its config if it is imported."""
    os.environ[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    if "jax" in sys.modules and getattr(_jax().config, name) != value:
        _jax().config.update(name, value)


def _jax() -> Any:
    return sys.modules["jax"]


def _jax_has_started() -> bool:
    """Whether devices exist already, from when on threads and devices are fixed."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()
