"""A machine that announces its end is left in time: what its metadata server says reaches the run, and only there.

The server is a small one on this machine, which answers as Google's does. That several processes agree on a step is in
test_faults.py.
"""

import contextlib

import pytest

from t5x_like.training import notices
from t5x_like.training.notices import Notices
from tests.training.metadata_server import Metadata


@pytest.fixture
def metadata():
    with contextlib.closing(Metadata()) as server:
        yield server


@pytest.mark.parametrize(
    ("key", "value"), [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")]
)
def test_a_notice_that_comes_is_told_once(metadata, key, value):
    watch = Notices(metadata.address, every=0.02)
    metadata.wait()
    assert watch.take() == []
    metadata.values[key] = value
    metadata.wait(looks=3)
    assert watch.take() == [(f"{key} {value} of the metadata server", True)]
    metadata.wait(looks=3)
    assert watch.take() == []
    watch.close()
    assert watch.thread is not None
    watch.thread.join(5)
    assert not watch.thread.is_alive()


def test_a_live_migration_and_a_server_that_fails_for_a_while_are_no_notice(metadata):
    watch = Notices(metadata.address, every=0.02)
    metadata.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    metadata.wait(looks=2)
    metadata.broken = True
    metadata.wait(looks=10)  # more than the looks after which one that never answered is given up
    metadata.broken = False
    metadata.wait(looks=2)
    assert watch.take() == []
    metadata.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    metadata.wait(looks=3)
    assert len(watch.take()) == 1
    watch.close()


def test_what_stood_before_is_told_apart_and_a_later_one_counts(metadata):
    metadata.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    watch = Notices(metadata.address, every=0.02)
    metadata.wait(looks=3)
    assert watch.take() == [("maintenance-event TERMINATE_ON_HOST_MAINTENANCE of the metadata server", False)]
    metadata.values["preempted"] = "TRUE"
    metadata.wait(looks=3)
    assert watch.take() == [("preempted TRUE of the metadata server", True)]
    watch.close()


def test_a_server_that_never_answers_or_is_another_or_has_no_such_keys_is_given_up():
    with contextlib.closing(Metadata(flavor="nginx")) as other:
        other.values["preempted"] = "TRUE"
        address = other.address
        watch = Notices(address, every=0.01)
        assert watch.thread is not None
        watch.thread.join(10)
        assert not watch.thread.is_alive() and watch.take() == []
    with contextlib.closing(Metadata()) as keyless:  # as in a pod under Workload Identity
        keyless.values.clear()
        watch = Notices(keyless.address, every=0.01)
        assert watch.thread is not None
        watch.thread.join(10)
        assert not watch.thread.is_alive() and watch.take() == []
    gone = Notices(address, every=0.01)
    assert gone.thread is not None
    gone.thread.join(10)
    assert not gone.thread.is_alive() and gone.take() == []


def test_no_proxy_is_asked(metadata, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    watch = Notices(metadata.address, every=0.02)
    metadata.wait(looks=2)
    watch.close()


def test_a_server_is_asked_only_where_there_is_one(tmp_path):
    google, other = tmp_path / "google", tmp_path / "other"
    google.write_text("Google Compute Engine\n")
    other.write_text("Standard PC\n")
    assert notices.server({}, product=str(google)) == "metadata.google.internal"
    assert notices.server({}, product=str(other)) is None
    assert notices.server({}, product=str(tmp_path / "nothing")) is None
    assert notices.server({"GCE_METADATA_HOST": "localhost:8080"}, product=str(other)) == "localhost:8080"
    assert notices.server({"NO_GCE_CHECK": "true", "GCE_METADATA_HOST": "a"}, product=str(google)) is None
    watch = Notices(None)
    assert watch.thread is None and watch.take() == []
    watch.close()
