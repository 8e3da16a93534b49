"""What needs the TPU compiler runs in one worker (libtpu takes a lock) and is skipped where there is none."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra [tpu])")
