"""Joins the processes of a run: who is who, and the coordinator's key-value store for small messages.

The store carries text of a few kilobytes (plans, faults, heartbeats); arrays go through the mesh. Not here: the
mesh (mesh.py), the watchdog (training/faults.py). A run of one process has no store, and every call is the identity.
"""

import atexit
import ctypes
import dataclasses
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from t5x_like.core.environment import RuntimeConfig
from t5x_like.core.errors import UsageError, UserError
from t5x_like.parallel import slurm

_PREFIX = "t5x_like"
_SECONDS = 300.0  # patience with the others where the caller names none
_LONGEST = 30 * 86400.0  # what an infinite patience becomes; a watchdog ends it sooner


class KeyValueStore:
    """Text by name, shared by all processes and kept by the coordinator. Safe to call from any thread."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def set(self, name: str, value: str, *, overwrite: bool = False) -> bool:
        """Sets `name`; False if it is there already and `overwrite` is off. The first writer wins."""
        try:
            self._client.key_value_set(f"{_PREFIX}/{name}", value, allow_overwrite=overwrite)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def get(self, name: str, *, timeout: float = _SECONDS) -> str:
        """Waits for `name` to be set by anyone; TimeoutError after `timeout` seconds."""
        try:
            return self._client.blocking_key_value_get(f"{_PREFIX}/{name}", _milliseconds(timeout))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise TimeoutError(f"no process has set {name!r} within {timeout:g} s") from None
            raise

    def barrier(self, name: str, *, timeout: float) -> None:
        """Waits until all processes have called this; TimeoutError after `timeout` seconds."""
        try:
            self._client.wait_at_barrier(f"{_PREFIX}/{name}", _milliseconds(timeout))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                raise TimeoutError(f"not all processes have reached {name!r} within {timeout:g} s") from None
            raise

    def folder(self, name: str) -> dict[str, str]:
        """What is set below `name/` now: {rest of the name: value}."""
        prefix = f"{_PREFIX}/{name}/"
        return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}


def _milliseconds(seconds: float) -> int:
    return max(1, int(min(seconds, _LONGEST) * 1000))


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run as this one sees them. `coordinator` is the address that process 0 listens on."""

    index: int
    count: int
    coordinator: str | None
    store: KeyValueStore | None
    aborts: "AbortReport | None"

    @property
    def primary(self) -> bool:
        return self.index == 0

    def broadcast(self, name: str, value: Any, *, timeout: float = _SECONDS) -> Any:
        """The JSON value that process 0 gives, on every process. A name is used once in a run."""
        if self.store is None:
            return value
        if self.primary and not self.store.set(f"broadcast/{name}", json.dumps(value)):
            raise ValueError(f"broadcast name {name!r} is used twice")
        return json.loads(self.store.get(f"broadcast/{name}", timeout=timeout))

    def gather(self, name: str, value: Any, *, timeout: float = _SECONDS) -> list[Any]:
        """The JSON values of all processes, by process index. A name is used once in a run."""
        if self.store is None:
            return [value]
        if not self.store.set(f"gather/{name}/{self.index}", json.dumps(value)):
            raise ValueError(f"gather name {name!r} is used twice")
        names = [f"gather/{name}/{index}" for index in range(self.count)]
        return [json.loads(self.store.get(key, timeout=timeout)) for key in names]

    def agree(self, name: str, value: Any, *, timeout: float = _SECONDS) -> Any:
        """`value` if it equals that of process 0, else UserError, which is the fault of this process."""
        first = self.broadcast(name, value, timeout=timeout)
        if first != json.loads(json.dumps(value)):
            raise UserError(
                f"{name} differs between processes: {json.dumps(first)} on process 0, {json.dumps(value)} on process "
                f"{self.index}; start all processes with the same command, files and versions"
            )
        return value

    def barrier(self, name: str, *, timeout: float = _SECONDS) -> None:
        """Waits until all processes are here. A name is used once in a run."""
        if self.store is not None:
            self.store.barrier(name, timeout=timeout)


ALONE = Processes(index=0, count=1, coordinator=None, store=None, aborts=None)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where this process stands, given by flags or environment; all None when jax is to find out."""

    coordinator: str | None
    process_id: int | None
    num_processes: int | None
    local_devices: list[int] | None


def start(
    config: RuntimeConfig,
    *,
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
) -> Processes:
    """Joins the other processes, if this is one of several, before any device is used.

    Explicit flags come first, then JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES, then what jax
    detects on TPU pods, in Slurm steps and in indexed Kubernetes jobs. Otherwise the process is alone.
    """
    if jax.distributed.is_initialized():
        return _identity(None)
    place = _explicit(coordinator, process_id, num_processes) or _detected(os.environ)
    if place is None or place.num_processes == 1:
        return ALONE
    seconds = int(config.phase_seconds.start) or int(_SECONDS)
    if place.process_id == 0 and place.coordinator:
        _check_port_is_free(place.coordinator)
    if _platform() in ("", "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    aborts = AbortReport()
    who = "this process" if place.process_id is None else f"process {place.process_id}"
    where = f"the coordinator {place.coordinator}" if place.coordinator else "the coordinator"
    aborts.explain = lambda: (
        f"{who}: not all processes have reached {where} within {seconds} s (config.runtime.phase_seconds.start); "
        "look for a process that did not start or cannot be reached"
    )
    aborts.install()
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.num_processes,
            process_id=place.process_id,
            local_device_ids=place.local_devices,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.shutdown_seconds,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"the processes of this run cannot be joined: {error}") from error
    aborts.explain = lambda: f"{who}: jax lost {where} or another process"
    if jax.default_backend() == "cpu":
        # Gloo gives a group of devices 30 s for its first collective: now, as all have just arrived.
        multihost_utils.sync_global_devices("t5x_like.multihost.start")
    return _identity(aborts)


def _identity(aborts: "AbortReport | None") -> Processes:
    from jax._src import distributed  # the store has no public name

    state = distributed.global_state
    if state.num_processes == 1:
        return ALONE
    store = KeyValueStore(state.client)
    return Processes(state.process_id, state.num_processes, state.coordinator_address, store, aborts)


# Finding our place.


def _explicit(coordinator: str | None, process_id: int | None, num_processes: int | None) -> _Place | None:
    """Flags, and for each that is missing the environment; None when neither says anything."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    num_processes = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    if process_id is None and num_processes is None:
        # The address alone corrects a detected place: Kubernetes and TPU pods name only that.
        return None
    if coordinator is None or process_id is None or num_processes is None:
        raise UsageError(
            f"--coordinator={coordinator} --process_id={process_id} --num_processes={num_processes}: give all three "
            "(or JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID, JAX_NUM_PROCESSES)"
        )
    if not 0 <= process_id < num_processes:
        raise UsageError(f"--process_id={process_id} should be from 0 to {num_processes - 1} (--num_processes less 1)")
    if not coordinator.rpartition(":")[2].isdigit() or ":" not in coordinator:
        raise UsageError(f"--coordinator={coordinator!r} should be HOST:PORT")
    return _Place(coordinator, process_id, num_processes, None)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdigit():
        raise UsageError(f"{name}={value!r} in the environment should be a whole number")
    return int(value)


def _detected(environ: Mapping[str, str]) -> _Place | None:
    """The place in a Slurm step, or one that jax.distributed.initialize() fills in on clusters it knows; else None."""
    if slurm.in_step(environ):
        address = environ.get("JAX_COORDINATOR_ADDRESS") or slurm.coordinator(environ)
        index, count = int(environ["SLURM_PROCID"]), int(environ["SLURM_NTASKS"])
        devices = None if _platform() == "cpu" else slurm.local_devices(environ)
        return _Place(address, index, count, devices)
    tpu_pod = len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    tpu_slices = int(environ.get("MEGASCALE_NUM_SLICES") or "1") > 1
    kubernetes_job = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if tpu_pod or tpu_slices or kubernetes_job or _on_tpu_machine(environ):
        return _Place(environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None)
    return None


def _on_tpu_machine(environ: Mapping[str, str]) -> bool:
    """Whether TPU chips are at hand and wanted: then jax asks the machine's metadata for its pod."""
    if _platform() not in ("", "tpu") or "TPU_SKIP_MDS_QUERY" in environ:
        return False
    return any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))


def _platform() -> str:
    return (getattr(jax.config, "jax_platforms", None) or "").split(",")[0]


def _check_port_is_free(coordinator: str) -> None:
    """jax ends in a segmentation fault when another program listens on its port."""
    port = int(coordinator.rpartition(":")[2])
    family, host = (socket.AF_INET6, "::") if socket.has_ipv6 else (socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise UserError(f"coordinator {coordinator}: {error.strerror}; choose another port") from None


class AbortReport:
    """One line when jax aborts this process, which it does from C++ when the coordinator or a peer is lost.

    Python's own signal handlers run later than abort() waits, hence a C handler through ctypes; it takes the
    interpreter's lock, which is free or ours since the aborting thread raises the signal itself.
    """

    def __init__(self) -> None:
        self.explain: Callable[[], str] = lambda: "jax aborted"
        self.write: Callable[[str], None] = lambda line: None  # a second place for the line, such as log.txt
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)

    def install(self) -> None:
        library = ctypes.CDLL(None)
        library.signal.restype = ctypes.c_void_p
        library.signal(int(signal.SIGABRT), self._handler)
        atexit.register(lambda: self)  # the handler must outlive every reference in Python

    def _on_abort(self, _signal: int) -> None:
        try:
            line = f"t5x_like: {self.explain()}"
            os.write(2, f"{line}\n".encode())
            self.write(line)
        finally:
            os._exit(1)


def answers(address: str, *, seconds: float = 1.0) -> bool:
    """Whether anything listens on HOST:PORT. A stopped process still does: the kernel answers for it."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError:
        return False
    return True
