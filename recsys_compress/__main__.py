"""The `recsys-compress` command, also `python -m recsys_compress`."""

import sys

from recsys_compress.runtime import configure


def main() -> None:
    """Runs the command line and exits with its status."""
    configure()  # before torch is imported

    from recsys_compress.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
