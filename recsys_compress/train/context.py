"""What surrounds a run: the versions it used, and signals to stop."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from recsys_compress.data.dataset import PreparedDataset

_SAME_SECONDS = 5.0
LIBRARIES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "pyarrow", "recsys-compress")


def tags(dataset: PreparedDataset) -> dict[str, str]:
    """Returns the data's checksum, library versions and the git commit."""
    found = {"dataset.checksum": dataset.checksum}
    for library in LIBRARIES:
        try:
            found[f"version.{library}"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    git = shutil.which("git")
    if git:
        head = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True)
        found |= {"git.commit": head.stdout.strip()} if head.returncode == 0 else {}
    return found


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT or SIGTERM sets; a later one acts as ever.

    A launcher of several processes hands on a Ctrl-C that they have had from the terminal already,
    so for them one that follows at once is the same.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    first = 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal first
        if event.is_set() and not (several and time.monotonic() - first < _SAME_SECONDS):
            signal.signal(number, before[number])
            signal.raise_signal(number)
        elif not event.is_set():
            first = time.monotonic()
            event.set()

    before = {int(n): signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
