"""Which MLflow a run is recorded in, and a quick check that it can be reached."""

import contextlib
import fcntl
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy

from recsys_compress.config import Job
from recsys_compress.errors import UserError

DEFAULT_URI = "sqlite:///mlflow.db"
CHECK_SECONDS = 5.0

_SERVERS = ("postgresql", "mysql", "mssql")
_DATABASES = ("sqlite", *_SERVERS)


def tracking_uri(job: Job | None = None) -> str:
    """Returns where a job is recorded: its own URI, the environment's, or the default."""
    own = None if job is None else job.tracking.uri
    return own or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def shown(text: str) -> str:
    """Returns a URI, or text that names one, without user names and passwords."""
    # In a database's a password may have a slash, which ends the host of any other.
    named = r"//\S*@" if text.startswith(_SERVERS) else r"//[^/@\s]*@"
    return re.sub(r"(?i)\b(password=)[^&\s]*", r"\1...", re.sub(named, "//", text))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its kind where it has none; see `shown`."""
    return shown(next(iter(str(error).splitlines()), "")) or type(error).__name__


def check_reachable(uri: str) -> None:
    """Checks within seconds that an MLflow server or database can be reached; writes no data.

    MLflow itself would go on trying for minutes.

    Raises:
        UserError: it cannot be reached.
    """
    try:
        if uri.startswith(("http://", "https://")):
            _check_server(uri)
        elif uri.startswith(_DATABASES):
            _check_database(uri)
    except (OSError, ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise UserError(
            f"tracking.uri = {shown(uri)!r}: cannot be reached ({first_line(error)}); "
            "start that server, or set tracking.uri or MLFLOW_TRACKING_URI to another"
        ) from error


def artifact_location(uri: str) -> str | None:
    """Returns the artifact folder for a new experiment: beside an SQLite file, else MLflow's own.

    MLflow's own choice would be whichever folder is the current one.
    """
    path = _sqlite_path(uri)
    return None if path is None else (path.absolute().parent / "mlruns").as_uri()


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Holds off other processes that would make the same SQLite database at the same time.

    Alembic's migrations, which make it, fail where two processes run them at once.
    """
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _check_server(uri: str) -> None:
    """Raises OSError if no MLflow server answers; asking for credentials is an answer."""
    url = f"{shown(uri).rstrip('/')}/health"
    try:
        with urllib.request.urlopen(url, timeout=CHECK_SECONDS):  # noqa: S310
            return
    except urllib.error.HTTPError as error:
        if error.code == 404 or error.code >= 500:
            raise ConnectionError(f"answers {error.code} {error.reason} at /health") from error
    except urllib.error.URLError as error:
        raise ConnectionError(error.reason) from error


def _check_database(uri: str) -> None:
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written")
        return
    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _sqlite_path(uri: str) -> Path | None:
    """Returns the file of an SQLite URI, or None for any other."""
    if not uri.startswith("sqlite:"):
        return None
    database = sqlalchemy.engine.make_url(uri).database
    return Path(database) if database else None
