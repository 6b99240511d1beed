"""What surrounds a run: the versions it used, and the user's Ctrl-C."""

import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from recsys_compress.data.dataset import PreparedDataset

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
def sigint() -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT sets; the second one acts as ever."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(_number: int, _frame: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
