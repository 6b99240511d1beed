"""The `recsys-compress` command, also `python -m recsys_compress`."""

import os
import sys


def main() -> None:
    """Runs the command line and exits with its status."""
    # OpenMP reads it when torch is loaded; its default, spinning, stalls up to 15 times longer as
    # soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from recsys_compress.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
