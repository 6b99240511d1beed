"""The process of one case: `python -m benchmarks.worker CASE` prints its figures as JSON."""

import importlib
import json
import sys

from benchmarks.case import Case
from recsys_compress import runtime


def main() -> None:
    """Measures the case given as JSON on the command line."""
    case = Case.load(sys.argv[1])
    if case.tuned:
        runtime.configure()  # before torch is imported, which the group's module does
    group = importlib.import_module(f"benchmarks.{case.group}")
    print(json.dumps(group.measure(case)))


if __name__ == "__main__":
    main()
