"""Batch inference of two trained models: `python -m recsys_compress.compare.inference RUN OTHER`.

Prints samples per second of CPU time, on one thread, of both models on the same batches of the
validation split, and their ratio: medians over rounds of one batch each, A B A B ...
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from recsys_compress.data.batch import Batch
from recsys_compress.data.reader import Reader
from recsys_compress.runtime import configure
from recsys_compress.train.build import Built
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group

ROUNDS = 25
WARMUP = 5


def main() -> None:
    """Measures the two runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--batch", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings(), process_group(), torch.no_grad():
        warnings.simplefilter("ignore")
        built, dataset = load_run(options.run)
        other, _ = load_run(options.other)
        batches = list(Reader(dataset, "valid", batch_size=options.batch).epoch(0))
        whole = [batch for batch in batches if len(batch) == options.batch] or batches[:1]
        spent: tuple[list[float], list[float]] = ([], [])
        for number in range(WARMUP + ROUNDS):
            batch = whole[number % len(whole)]
            for model, times in zip((built, other), spent, strict=True):
                times.append(_seconds(model, batch) / len(batch))
    speeds = [1 / statistics.median(times[WARMUP:]) for times in spent]
    ratio = statistics.median(b / a for a, b in zip(*(t[WARMUP:] for t in spent), strict=True))
    found = {"rows_per_s": speeds[0], "before": speeds[1], "ratio": ratio}
    sys.stdout.write(json.dumps(found) + "\n")


def _seconds(built: Built, batch: Batch) -> float:
    start = time.process_time()
    built.model(batch.dense, batch.sparse)
    return time.process_time() - start


if __name__ == "__main__":
    configure()
    main()
