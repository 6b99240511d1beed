"""CPU time of training until validation AUCs are reached, on generated data of known best AUC."""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Figures
from benchmarks.peers.contestant import Rows, Sizes, open_contestant

SHARES = (0.85, 0.9)  # of the way from 0.5 to the best AUC there is; ascending
EPOCHS = 3
EVALUATIONS = 8  # in an epoch
_EVALUATION_ROWS = 8192


def measure(case: Case) -> Figures:
    """Returns the CPU seconds of training on one thread, evaluation left out.

    For each of `SHARES` "target SHARE", the AUC asked for, and "seconds SHARE" and "steps SHARE"
    until it is reached, which are not there where it is not within `EPOCHS`. "auc": the best on
    the validation rows. "best": the one that the true odds have.
    """
    torch.set_num_threads(1)
    folder, shape = Path(case.data), case.shape
    train, valid = Rows.read(folder / "train"), Rows.read(folder / "valid")
    best = float((folder / "best").read_text(encoding="utf-8"))
    targets = {share: 0.5 + share * (best - 0.5) for share in SHARES}
    tables = tuple(int(n) for n in (folder / "tables").read_text(encoding="utf-8").split())
    sizes = Sizes(tables=tables, dim=shape.dim, dense=shape.dense)
    steps = len(train) // shape.batch
    between = max(1, steps // EVALUATIONS)
    figures: Figures = {f"target {share}": target for share, target in targets.items()}
    figures |= {"best": best, "auc": 0.0}
    spent = 0.0
    with open_contestant(case.name, sizes, case.seed) as own:
        for number in range(EPOCHS * steps):
            first = number % steps * shape.batch
            rows = train.part(first, first + shape.batch)
            start = time.process_time()
            own.step(rows)
            spent += time.process_time() - start
            if (number + 1) % between:
                continue
            figures["auc"] = max(figures["auc"], auc(own, valid))
            reached = [share for share, target in targets.items() if figures["auc"] >= target]
            for share in reached:
                figures.setdefault(f"seconds {share}", spent)
                figures.setdefault(f"steps {share}", number + 1)
            if len(reached) == len(SHARES):
                return figures
    return figures


def auc(own: Any, rows: Rows) -> float:
    """Returns the AUC of a contestant's scores; a tie counts half."""
    starts = range(0, len(rows), _EVALUATION_ROWS)
    parts = [rows.part(first, first + _EVALUATION_ROWS) for first in starts]
    scores = torch.cat(
        [torch.as_tensor(own.scores(p), dtype=torch.float64).flatten() for p in parts]
    )
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[places]
    positive = int(rows.labels.sum())
    above = float(ranks[rows.labels == 1].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(rows) - positive))
