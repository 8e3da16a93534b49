"""Fixtures of the tests of conversion."""

from tests.storage.fake_gcs import fake_gcs  # noqa: F401
