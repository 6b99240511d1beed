"""A trained model as it is served: `python -m recsys_compress.compare.served RUN`.

Prints, for each storage type asked for, the test AUC and the bytes of its tables; and samples per
second of CPU time, on one thread, of it and of another model on the same batches of the validation
split, and their ratio: medians over rounds of one batch each, A B A B ...
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

import torch

from recsys_compress.compress.size import DataType
from recsys_compress.compress.storage import StoragePlan
from recsys_compress.data.batch import Batch
from recsys_compress.data.reader import Reader
from recsys_compress.runtime import configure
from recsys_compress.train.build import Built
from recsys_compress.train.post import load_run, store
from recsys_compress.train.shard import process_group

ROUNDS = 25
WARMUP = 5


def main() -> None:
    """Measures the run named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--storage", nargs="*", default=[])
    parser.add_argument("--against", type=Path)
    parser.add_argument("--batch", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {kind: _stored(options.run, kind) for kind in options.storage}
        if options.against is not None:
            found["inference"] = _inference(options.run, options.against, options.batch)
    sys.stdout.write(json.dumps(found) + "\n")


def _stored(run: Path, kind: DataType) -> dict[str, float]:
    """Returns AUC and bytes of a run's model with its tables in a storage type."""
    stored = store(run, StoragePlan(types=kind))
    return {"auc": stored.test["auc"], "bytes": stored.bytes["tables"]}


def _inference(run: Path, against: Path, size: int) -> dict[str, float]:
    """Returns samples a second of a run's model in batches of a size, and their ratio."""
    with process_group():
        built, dataset = load_run(run)
        other, _ = load_run(against)
        # No more than are timed: the whole split may not fit memory.
        reader = Reader(dataset, "valid", batch_size=size)
        batches = list(islice(reader.epoch(0), WARMUP + ROUNDS))
        whole = [batch for batch in batches if len(batch) == size] or batches[:1]
        spent: tuple[list[float], list[float]] = ([], [])
        for number in range(WARMUP + ROUNDS):
            batch = whole[number % len(whole)]
            for model, times in zip((built, other), spent, strict=True):
                times.append(_seconds(model, batch) / len(batch))
    own, others = (times[WARMUP:] for times in spent)
    ratio = statistics.median(b / a for a, b in zip(own, others, strict=True))
    return {"rows_per_s": 1 / statistics.median(own), "ratio": ratio}


@torch.no_grad()  # not above: a model whose tables train in the backward pass is built with it
def _seconds(built: Built, batch: Batch) -> float:
    start = time.process_time()
    built.model(batch.dense, batch.sparse)
    return time.process_time() - start


if __name__ == "__main__":
    configure()
    main()
