"""Notices of a Google Cloud machine that it will be taken: they come before any signal does.

The metadata server of a machine (a TPU VM's among them; in a pod of GKE that of its node, but under Workload Identity
one that lacks these keys) says `maintenance-event`, which is TERMINATE_ON_HOST_MAINTENANCE some time before the machine
is stopped (a live migration needs nothing of us), and `preempted`, which is TRUE once a spot machine is taken back. A
thread asks for both every few seconds, each request bounded; a server that never answered, or has neither key, is given
up: there SIGTERM is the first warning. What stands already when the watch begins is said and not acted on: it was acted
on by the start before, and a machine may be announced an hour ahead, which a run that ends at once each time would
spend on starting. https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice

A server is asked only where there is one: GCE_METADATA_HOST or GCE_METADATA_IP name it, or the machine says that it is
Google's; never with NO_GCE_CHECK, by which Google's own libraries are kept from asking too. (TPU_SKIP_MDS_QUERY says
nothing here: jax sets it wherever it sees no TPU, on a machine with GPUs too.) Standard library only.
"""

import contextlib
import http.client
import os
import queue
import threading
import urllib.request
from collections.abc import Mapping

# Key below instance/ -> its value that announces the end.
ENDS: Mapping[str, str] = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}

_EVERY = 3.0  # s between two looks; a spot machine has 30 s from its notice
_REQUEST = 3.0  # s for an answer
_TRIALS = 5  # looks without any answer after which there is no such server
_PRODUCT = "/sys/class/dmi/id/product_name"


def server(environ: Mapping[str, str] = os.environ, *, product: str = _PRODUCT) -> str | None:
    """HOST or HOST:PORT of the metadata server of this machine; None where there is none, or it is not to be asked."""
    if environ.get("NO_GCE_CHECK", "").lower() in ("true", "1"):
        return None
    named = environ.get("GCE_METADATA_HOST") or environ.get("GCE_METADATA_IP")
    if named:
        return named
    with contextlib.suppress(OSError), open(product, encoding="utf-8", errors="replace") as file:
        if "Google" in file.read(256):
            return "metadata.google.internal"
    return None


class Notices:
    """The watch of one process; without a server it does nothing. `take` may be called from any thread."""

    def __init__(self, address: str | None, *, every: float = _EVERY) -> None:
        self._address, self._every = address, every
        self._new: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._closed = threading.Event()
        # No proxy: the server is on the machine itself.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.thread: threading.Thread | None = None
        if address:
            self.thread = threading.Thread(target=self._watch, name="notices", daemon=True)
            self.thread.start()

    def take(self) -> list[tuple[str, bool]]:
        """(notice, whether it came since the watch began) of those that nobody has taken yet."""
        found = []
        while not self._new.empty():
            found.append(self._new.get())
        return found

    def close(self) -> None:
        """Asks no more. A request that is under way is not waited for: its thread ends with the process."""
        self._closed.set()

    def _watch(self) -> None:
        said: dict[str, str | None] = {}
        silent = 0
        while not self._closed.is_set():
            answers = {key: self._ask(key) for key in ENDS}
            silent = 0 if any(answer is not None for answer in answers.values()) else silent + 1
            if silent >= _TRIALS and not said:
                return
            for key, answer in answers.items():
                if answer is None:
                    continue
                if answer == ENDS[key] and said.get(key) != answer:
                    self._new.put((f"{key} {answer} of the metadata server", key in said))
                said[key] = answer
            self._closed.wait(self._every)

    def _ask(self, key: str) -> str | None:
        """The value of a key of this machine, None where there was no answer."""
        request = urllib.request.Request(
            f"http://{self._address}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
        )
        try:
            with self._opener.open(request, timeout=_REQUEST) as answer:
                if answer.headers.get("Metadata-Flavor") != "Google":
                    return None  # a page of someone else's, such as a captive portal
                return answer.read(256).decode("utf-8", "replace").strip()
        except (OSError, ValueError, http.client.HTTPException):  # a URLError is an OSError
            return None
