"""From values to a tool's command: what it is handed, what is said afterwards, and what stops before it."""

import sys

import pytest
import yaml

from launch import gke
from launch import job as jobs_of
from launch.submission import Step, Submission, submit
from t5x_like.core.errors import UserError
from t5x_like.storage import paths
from tests.launch import jobs
from tests.storage.fake_gcs import fake_gcs  # noqa: F401


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a program of this name into PATH, which keeps its arguments and its standard input."""

    def install(name, *, status=0):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / name
        program.write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(tmp_path / 'arguments')!r}, 'a').write(repr(sys.argv[1:]) + chr(10))\n"
            f"open({str(tmp_path / 'input')!r}, 'w').write(sys.stdin.read())\n"
            f"sys.exit({status})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return tmp_path

    return install


def flags(**values):
    return [jobs.CONFIG, "--no_check", *(f"--{name}={value}" for name, value in (jobs.USUAL | values).items())]


def test_kubectl_gets_the_manifest_on_its_standard_input(tool, capsys):
    folder = tool("kubectl")
    assert gke.main(flags()) == 0
    assert (folder / "arguments").read_text() == "['--namespace=default', 'create', '--filename=-']\n"
    assert yaml.safe_load((folder / "input").read_text()) == gke.manifest(jobs.job())
    out = capsys.readouterr().out
    assert "# watch the first process: kubectl" in out and "apiVersion" not in out


def test_a_tool_that_fails_is_one_line(tool, capsys):
    tool("kubectl", status=3)
    assert gke.main(flags()) == 1
    error = capsys.readouterr().err
    assert error == (
        "launch: kubectl --namespace=default create --filename=- ended with status 3; nothing more was done\n"
    )


def test_a_tool_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gke.main(flags()) == 1
    assert "launch: kubectl is not installed or not in PATH" in capsys.readouterr().err


def test_nothing_is_submitted_of_a_job_with_a_fault(tool, capsys):
    folder = tool("kubectl")
    assert gke.main(flags(name="a" * 60)) == 2
    assert not (folder / "arguments").exists()
    assert "of 81 characters, and 63 is the most" in capsys.readouterr().err


def test_steps_after_one_that_failed_are_not_taken(tool):
    folder = tool("first", status=1)
    tool("second")
    with pytest.raises(UserError, match="first ended with status 1"):
        submit(Submission((), (Step(("first",)), Step(("second",))), {}), dry_run=False)
    assert (folder / "arguments").read_text() == "[]\n"


def test_a_bucket_that_takes_an_object_is_left_as_it_was(fake_gcs):  # noqa: F811
    bucket = fake_gcs.bucket()
    jobs_of.check_writable(jobs.job(workdir=f"{bucket}/runs/llama"))
    assert paths.list_names(bucket) == []


def test_a_bucket_that_is_not_there_stops_before_anything_is_submitted(fake_gcs, tool, capsys, monkeypatch):  # noqa: F811
    folder = tool("kubectl")
    monkeypatch.setattr("launch.check.check_job", lambda job: None)  # which has tests of its own
    given = [each for each in flags(workdir="gs://no-such-bucket/llama") if each != "--no_check"]
    assert gke.main(given) == 1
    error = capsys.readouterr().err
    assert "launch: --workdir=gs://no-such-bucket/llama cannot be written" in error
    assert "there is no bucket 'no-such-bucket'" in error and error.count("\n") == 1
    assert not (folder / "arguments").exists()


def test_a_bucket_that_may_not_be_written_is_one_line(monkeypatch):
    class Refusing:
        def pipe_file(self, path, data):
            raise OSError("Forbidden: caller does not have storage.objects.create access")

    monkeypatch.setattr("t5x_like.storage.bucket_file.client", Refusing)
    with pytest.raises(UserError, match="cannot be written: .*access refused .*storage.objects.create") as error:
        jobs_of.check_writable(jobs.job())
    assert "\n" not in str(error.value)
