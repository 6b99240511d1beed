import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from recsys_compress.config import Job
from recsys_compress.errors import UserError
from recsys_compress.track.uri import (
    artifact_location,
    check_reachable,
    first_line,
    shown,
    tracking_uri,
)
from tests.track.conftest import free_port, recorded_in


def test_the_job_wins_over_the_environment_over_the_default(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(job) == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b")
    assert tracking_uri(job) == "http://b"
    assert tracking_uri(recorded_in(job, "http://a")) == "http://a"


def test_a_server_that_is_away_is_known_within_seconds() -> None:
    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    before = time.perf_counter()
    with pytest.raises(UserError, match=r"cannot be reached .*refused.* start") as error:
        check_reachable(uri)
    assert time.perf_counter() - before < 6
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_is_not_mlflow_is_an_error() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with pytest.raises(UserError, match="answers 501"):
                check_reachable(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, " * 100)
    with pytest.raises(UserError, match=r"cannot be reached .*file is not a database"):
        check_reachable(f"sqlite:///{path}")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        check_reachable(f"sqlite:///{tmp_path}/file/below/mlflow.db")


def test_checking_makes_no_file(tmp_path: Path) -> None:
    check_reachable(f"sqlite:///{tmp_path}/below/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_artifacts_go_beside_sqlite_and_elsewhere_where_mlflow_says() -> None:
    assert artifact_location("sqlite:////data/mlflow.db") == "file:///data/mlruns"
    assert artifact_location("http://host") is None


def test_passwords_are_not_shown() -> None:
    assert shown("https://me:word@host/x@y") == "https://host/x@y"
    assert shown("postgresql://me:pa/ss@host/db") == "postgresql://host/db"
    assert shown("mysql://host/db?password=word&x=1") == "mysql://host/db?password=...&x=1"
    said = first_line(OSError("API request to http://me:word@host:1/api failed\nmore"))
    assert said == "API request to http://host:1/api failed"
