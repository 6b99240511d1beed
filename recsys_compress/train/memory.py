"""Memory of this process and of the machine, as the kernel counts it."""

import os
import resource
from pathlib import Path


def peak_rss_bytes() -> int:
    """Returns the largest resident memory so far.

    From the kernel's status page where there is one: `getrusage` there begins with the peak of the
    process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes() -> int:
    """Returns the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
