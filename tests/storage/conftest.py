"""Fixtures of the storage tests."""

from tests.storage.fake_gcs import fake_gcs  # noqa: F401
