"""Speed and memory, shown in one command: `python -m benchmarks.run`."""
