"""A registered model behind MLflow's own scoring server."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from recsys_compress.errors import UserError
from recsys_compress.track.client import connected
from recsys_compress.track.registry import fetch_model, named

_ENVIRONMENT = {
    # Requests come in threads of their own; OpenMP threads below them would only fight for cores.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def serve(model: str, uri: str, host: str, port: int, workers: int) -> int:
    """Serves a registered model until the process is told to stop.

    The version is fetched and checked once: the server goes on with it when the registry is away,
    and another champion is served by a new process.

    Args:
        model: like models:/NAME@champion.
        uri: of MLflow.
        host: address to listen at.
        port: port to listen at.
        workers: processes.

    Returns:
        The server's exit status.

    Raises:
        UserError: there is no such version, its artifact has been changed, or MLflow cannot be
            reached.
    """
    with tempfile.TemporaryDirectory() as temporary:
        with connected(uri) as client:
            version = named(client, model)
            folder = fetch_model(client, version, Path(temporary))
        print(  # noqa: T201
            f"{model}: version {version.version} at http://{host}:{port}/invocations",
            file=sys.stderr,
            flush=True,
        )
        # MLflow starts `uvicorn` by name: the one beside this Python is the right one.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = [
            *(sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"),
            *("--model-uri", str(folder), "--host", host, "--port", str(port)),
            *("--workers", str(workers)),
        ]
        environment = {**_ENVIRONMENT, **os.environ, "PATH": path}
        try:
            process = subprocess.Popen(command, env=environment)
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started ({error})") from error
        return _wait(process)


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Returns the status of a process, which hears of the signals that this one gets."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    status = process.wait()
    return 128 - status if status < 0 else status
