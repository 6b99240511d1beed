"""The process of one case: `python -m benchmarks.worker CASE` prints its figures as JSON."""

import importlib
import json
import os
import sys

from benchmarks.case import Case
from recsys_compress import runtime


def main() -> None:
    """Measures the case given as JSON on the command line."""
    case = Case.load(sys.argv[1])
    if case.tuned:
        runtime.configure()  # before torch is imported, which the group's module does
    group = importlib.import_module(f"benchmarks.{case.group}")
    figures = group.measure(case)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks for all
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
