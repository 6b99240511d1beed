"""Real gloo processes for tests: functions of test modules, run by several at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_SECONDS = 240


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Returns what `torchrun` would set."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: list[str], size: int) -> list[subprocess.Popen[str]]:
    """Starts a command in each of several processes that find each other."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, size, port),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]


def run(module: str, size: int, **arguments: Any) -> list[Any]:
    """Runs `module.main(**arguments)` in several processes; returns what each returns, as JSON.

    Raises:
        AssertionError: a process failed; its standard error is the message.
    """
    code = (
        "import json, sys, torch; torch.set_num_threads(1);"
        f"from {module} import main; result = main(**json.loads(sys.argv[1]));"
        "print(json.dumps(result))"
    )
    processes = start(["-c", code, json.dumps(arguments)], size)
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=_SECONDS)
            assert process.returncode == 0, err[-3000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return found
