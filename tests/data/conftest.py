"""Fixtures of the data tests."""

from tests.storage.fake_gcs import fake_gcs  # noqa: F401
