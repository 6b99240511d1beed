"""Real gloo processes for tests: functions of test modules, run by several at once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ports import free_port

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


def start(
    command: list[str], size: int, prepare: Mapping[int, Callable[[], None]] | None = None
) -> list[subprocess.Popen[str]]:
    """Starts a command in each of several processes that find each other.

    Args:
        command: what Python runs.
        size: number of processes.
        prepare: by rank, what a process does first.
    """
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, size, port),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=(prepare or {}).get(rank),
        )
        for rank in range(size)
    ]


@dataclass(frozen=True)
class Done:
    """What became of a process."""

    status: int
    out: str
    err: str


def finish(processes: list[subprocess.Popen[str]], seconds: float = _SECONDS) -> list[Done]:
    """Waits for processes; those that take longer are killed, which their status shows."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    for process in processes:
        process.kill()
    outputs = [process.communicate() for process in processes]
    return [
        Done(process.returncode, out, err)
        for process, (out, err) in zip(processes, outputs, strict=True)
    ]


def run(module: str, size: int, **arguments: Any) -> list[Any]:
    """Runs `module.main(**arguments)` in several processes; returns what each returns, as JSON.

    It must leave no thread of the process group: one that is at work when the interpreter ends
    aborts the process now and then.

    Raises:
        AssertionError: a process failed; its standard error is the message.
    """
    code = (
        "import json, sys, torch; from pathlib import Path; torch.set_num_threads(1);"
        f"from {module} import main; result = main(**json.loads(sys.argv[1]));"
        "print(json.dumps(result));"
        "names = [path.read_text() for path in Path('/proc/self/task').glob('*/comm')];"
        "assert not [name for name in names if 'gloo' in name], names"
    )
    found = finish(start(["-c", code, json.dumps(arguments)], size))
    assert {done.status for done in found} == {0}, "\n".join(
        f"status {done.status}: {done.err[-3000:]}" for done in found
    )
    return [json.loads(done.out.splitlines()[-1]) for done in found]
