"""A session around a loop that only ends: what is closed when, and when a run counts as finished."""

import contextlib
import dataclasses

import pytest

from t5x_like.core.environment import READING, Environment
from t5x_like.core.errors import UserError
from t5x_like.data.tokenizers import vocabularies
from t5x_like.parallel import multihost
from t5x_like.storage import manifest
from t5x_like.storage.checkpoint import Checkpoints
from t5x_like.storage.workdir import Workdir
from t5x_like.training.keep import CheckpointConfig
from t5x_like.training.ledger import Ledger
from t5x_like.training.session import Inputs, Request, Session
from t5x_like.training.telemetry import ProfileConfig, Telemetry, TelemetryConfig
from t5x_like.training.trackers import MlflowConfig, WandbConfig

CHECKPOINT = CheckpointConfig(4, False, 60, 2, None, None, "min", 1, None, (".*",), "model", None)
NO_WANDB, NO_MLFLOW = WandbConfig("", "offline"), MlflowConfig("", "")
TELEMETRY = TelemetryConfig(False, False, 60.0, False, ProfileConfig(0, 0), NO_WANDB, NO_MLFLOW)


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What a loop of some other kind comes back with."""

    finished: bool


def _noted(seen, cls, name):
    """The method, which also says that it has run."""
    done = getattr(cls, name)

    def noted(self, *arguments):
        done(self, *arguments)
        seen.append(f"{cls.__name__}.{name}")

    return noted


@pytest.fixture
def order(monkeypatch):
    """What happened, in order."""
    seen: list[str] = []
    monkeypatch.setattr(multihost, "start", lambda *_, **__: multihost.ALONE)
    for cls, name in ((Telemetry, "close"), (Checkpoints, "close"), (Workdir, "record_finished")):
        monkeypatch.setattr(cls, name, _noted(seen, cls, name))
    return seen


@contextlib.contextmanager
def opened(folder):
    request = Request(str(folder), check=False, coordinator=None, process_id=None, num_processes=None)
    with Session(request, READING, Environment(threads=1, compilation_cache=None, notes=())) as session:
        session.open_workdir({"seed": 0}, overrides={}, may_change=())
        yield session


def loop(session, seen, *, finished=True):
    """A loop of no step, which opens telemetry as any loop does."""

    def run(checkpoints):
        session.closing(lambda: seen.append("prefetch.close"))
        session.telemetry(
            TELEMETRY, flops_per_token=None, tokens_per_step=1, devices=[Device()], total_steps=4, start_step=0
        )
        return Rollouts(finished)

    return run


class Device:
    device_kind, platform, process_index = "none", "none", 0

    def memory_stats(self):
        return None


def test_a_run_is_recorded_as_finished_after_all_that_it_wrote_is_closed(tmp_path, order):
    with opened(tmp_path) as session:
        assert session.run(loop(session, order), checkpoint=CHECKPOINT, steps=4).finished
        assert session.workdir.finished_step() == 4
    assert order == ["Telemetry.close", "prefetch.close", "Checkpoints.close", "Workdir.record_finished"]


def test_a_loop_that_was_stopped_is_not_finished(tmp_path, order):
    with opened(tmp_path) as session:
        assert not session.run(loop(session, order, finished=False), checkpoint=CHECKPOINT, steps=4).finished
        assert session.workdir.finished_step() is None
    assert "Workdir.record_finished" not in order and "Checkpoints.close" in order


@pytest.mark.parametrize("cls", [Telemetry, Checkpoints])
def test_what_cannot_be_closed_fails_the_run_which_is_then_not_finished(tmp_path, order, monkeypatch, cls):
    close = cls.close

    def broken(self):
        close(self)
        raise UserError("the bucket cannot be reached")

    monkeypatch.setattr(cls, "close", broken)
    with pytest.raises(UserError, match="cannot be reached"), opened(tmp_path) as session:
        session.run(loop(session, order), checkpoint=CHECKPOINT, steps=4)
    assert "Workdir.record_finished" not in order and "Checkpoints.close" in order


def test_a_process_that_ends_itself_sends_its_log_before_it_waits_for_the_record(tmp_path, order, monkeypatch):
    """It has a few seconds, of which an upload of the record may take all."""
    for cls, name in ((Ledger, "end"), (Telemetry, "publish_log"), (Ledger, "close")):
        monkeypatch.setattr(cls, name, _noted(order, cls, name))
    with opened(tmp_path) as session:
        with session.preparing():
            pass

        def ends_itself(checkpoints):
            outcome = loop(session, order)(checkpoints)
            session.faults._part("no progress", 1)
            return outcome

        session.run(ends_itself, checkpoint=CHECKPOINT, steps=4)
    assert order[:3] == ["Ledger.end", "Telemetry.publish_log", "Ledger.close"]


def test_rows_that_cannot_be_read_cost_the_account_and_not_the_start(tmp_path, order, capsys):
    with opened(tmp_path) as session:
        entry = {"time": "2026-01-01T00:00:00+0000", "resumed_from": None}
        manifest.write(str(tmp_path), {"format": 1, "starts": [entry], "goodput": {"kept": True}})
        (tmp_path / "metrics.jsonl").write_text("no row\n")
        with session.preparing():
            pass
        session.record_start(Inputs("data", vocabularies.load("bytes"), {"fsdp": 1}), resumed_from=None)
        said = capsys.readouterr().err
        assert said.startswith("t5x_like: no account of where the time went: ") and "no row" in said
        assert session.account().rows == []
    kept = manifest.read(str(tmp_path))
    assert len(kept["starts"]) == 2 and kept["goodput"] == {"kept": True}
