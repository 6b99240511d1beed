"""Settings of the process: of memory and threads, before torch is imported, and of its arithmetic.

Figures are of a Xeon with 2 cores, in CPU milliseconds of one step of the embedding part: 26
features, 10 M rows of width 16 (2.5 M of width 64) in one table, batch 8192; see docs/benchmarks.
"""

import ctypes
import os

MIB = 1 << 20

# A value that the user has set wins.
ENVIRONMENT = {
    # Idle OpenMP threads sleep. By default they spin, and as soon as another process wants their
    # core, every parallel region stalls for a tick of the scheduler: up to 15 times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch asks for huge pages for tensors of 2 MiB and more, of which the kernel makes use where
    # transparent huge pages are on "madvise": fewer TLB misses in large tables. At width 16 it
    # takes both this and what stands below, 35 to 31.5; at width 64 this alone takes 92 to 73.
    "THP_MEM_ALLOC_ENABLE": "1",
}

# Parameters of glibc's mallopt(3): number, value, and the variable by which users set them.
_MALLOC = (
    # Outputs and gradients of a step come from the heap, not from fresh pages that the kernel must
    # clear each time: 92 to 69 at width 64, and 65 with huge pages. glibc by itself goes up to
    # 32 MiB, so that at width 16 this alone changes nothing.
    (-3, 256 * MIB, "MALLOC_MMAP_THRESHOLD_"),
    # Memory freed at the end of the heap is kept up to this much, for the next step; else some
    # steps give it back and fault it in again.
    (-1, 512 * MIB, "MALLOC_TRIM_THRESHOLD_"),
)


def configure() -> None:
    """Sets up memory and threads for training; call it before torch is imported.

    Where there is no glibc, or no Linux, what does not apply is left out.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    for parameter, size, variable in _MALLOC:
        if variable not in os.environ:
            mallopt(parameter, size)  # an older glibc refuses more than 32 MiB, harmlessly


def flush_denormals() -> None:
    """Makes this thread, and threads that it starts, take numbers below 1.2e-38 for zero.

    The processor is up to 200 times slower with them than with other numbers, and training makes
    them: moments of Adam fade by a tenth a step, weight decay shrinks rows that nothing reads, and
    products of two such rows are smaller still. A step of `quotient_remainder` with weight decay on
    Frappe took 0.1 s at first, and 3 s after a thousand steps.
    """
    import torch

    torch.set_flush_denormal(True)
