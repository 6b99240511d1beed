"""A connection to MLflow that fails within seconds, with one clear line."""

import contextlib
import logging
import os
from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from recsys_compress.errors import UserError
from recsys_compress.track.uri import alone, check_reachable, first_line, shown

# MLflow's own defaults are 7 retries of 120 s each.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def reach(uri: str) -> None:
    """Checks that MLflow can be reached; writes no data.

    Raises:
        UserError: it cannot.
    """
    for key, value in _PATIENCE.items():
        os.environ.setdefault(key, value)
    # MLflow tells of each table that it makes, Alembic of each of its 60 schema versions.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    check_reachable(uri)


@contextlib.contextmanager
def connected(uri: str) -> Iterator[MlflowClient]:
    """Yields a client of a tracking server that is also the registry.

    Raises:
        UserError: it cannot be reached, or refuses what is asked of it inside.
    """
    reach(uri)
    try:
        with alone(uri):  # the database may have to be made
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_registered_models(max_results=1)
        yield client
    except (MlflowException, OSError) as error:
        raise UserError(f"MLflow at {shown(uri)!r}: {first_line(error)}") from error
