"""Ours beside other libraries: `python -m benchmarks.peers.run [--quick] [--only PART]`.

Every case runs in a process of its own, those of the peers in the environment that
`make bench-peers` builds; cases in turn (A B C A B C ...), so that a neighbour's load falls on all.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.case import ROOT, Case, Figures, Shape, run
from benchmarks.peers import page
from benchmarks.peers.contestant import PEERS, Rows
from benchmarks.peers.records import Records
from benchmarks.peers.training import available_bytes
from benchmarks.report import machine
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.train.metrics import BinaryMetrics

PYTHON = ROOT / ".venv-peers/bin/python"
LOCK = Path(__file__).parent / "requirements.lock"
SHAPE = Shape(warmup=1, steps=5)
UNTIL = Shape(batch=1024, examples=165_000)
QUICK = Shape(features=4, rows=40_000, dim=8, batch=256, dense=2, warmup=1, steps=2, examples=4000)
CONTESTANTS = ("full", "unified", "stock", "sparse", "dense", "fuxictr", "deepctr")
TRAINED = ("full", "full bf16", "unified", "stock", "stock bf16", *CONTESTANTS[3:])
SERVED = (
    *("full fp32", "full int8", "full int8 layers"),
    *("unified fp32", "unified int8", "unified int8 layers"),
    *("stock", "dense", "fuxictr", "deepctr"),
)
GROWING = ("full", "unified", "stock", "fuxictr")
# What grows, and which batch the rest is measured at: at 8192 examples, 200 features take minutes.
GROWTH = {
    "rows": ((1_000_000, 10_000_000, 100_000_000), 8192),
    "features": ((10, 26, 100, 200), 512),
    "batch": ((512, 8192, 65_536), 8192),
}
QUICK_GROWTH = {"rows": ((4000, 40_000), 256)}
PARTS = ("training", "inference", "until", *GROWTH)
REPEATS = 3
_VALID = 0.1  # share of the rows


def cases(part: str, quick: bool) -> list[Case]:
    """Returns a part's cases; peers start as they are, and FuxiCTR in our settings too."""
    growth = QUICK_GROWTH if quick else GROWTH
    if part in ("training", "inference"):
        shape, names = QUICK if quick else SHAPE, TRAINED if part == "training" else SERVED
        found = [_case(part, name, shape) for name in names]
        extra = [case for case in found if case.name == "fuxictr" and part == "training"]
        return found + [dataclasses.replace(case, tuned=True) for case in extra]
    if part == "until":
        return [_case(part, name, QUICK if quick else UNTIL) for name in CONTESTANTS]
    values, batch = growth.get(part, ((), 0))
    base = dataclasses.replace(QUICK if quick else SHAPE, batch=batch, warmup=1, steps=3)
    shapes = [dataclasses.replace(base, **{part: value}) for value in values]
    return [_case("training", name, shape) for shape in shapes for name in GROWING]


def _case(module: str, name: str, shape: Shape) -> Case:
    ours = name.split()[0] in ("full", "unified")
    return Case(group=f"peers.{module}", name=name, tuned=ours, shape=shape)


def obstacle(case: Case, python: Path) -> str:
    """Returns why a case cannot be measured here, or nothing."""
    if case.name in PEERS and not python.exists():
        return "not measured: its environment is not there (`make bench-peers` builds it)"
    tables = 4 * case.shape.rows * case.shape.dim
    # Dense Adam has two moments and a gradient beside each value.
    copies = 4 if case.name in (*PEERS, "dense") else 0.1 if case.name == "unified" else 1.1
    activations = 100 * case.shape.batch * (case.shape.features * case.shape.dim)
    needed = tables * copies + activations + 0.7e9
    if needed > available_bytes():
        free = available_bytes() / 1e9
        return f"not measured: takes about {needed / 1e9:.0f} GB, and {free:.0f} GB were free"
    return ""


def generate(shape: Shape, folder: Path) -> Path:
    """Writes training and validation rows of a known best AUC, for `benchmarks.peers.until`."""
    cardinalities = np.geomspace(4, 100_000, shape.features).astype(int).tolist()
    source = Synthetic(rows=shape.examples, cardinalities=tuple(cardinalities), dense=shape.dense)
    (chunk,) = source.chunks(shape.examples)
    columns = {name: chunk.table[name].to_numpy() for name in chunk.table.column_names}
    dense = [columns[name] for name in source.schema().dense]
    ids = [columns[field.name] for field in source.schema().categorical]
    rows = Rows(
        dense=torch.from_numpy(np.stack(dense, axis=1)),
        ids=torch.from_numpy(np.stack(ids)),
        labels=torch.from_numpy(columns["label"].astype(np.float32)),
    )
    first = round(_VALID * len(rows))
    rows.part(first, len(rows)).write(folder / "train")
    rows.part(0, first).write(folder / "valid")
    best = BinaryMetrics()
    odds = torch.from_numpy(chunk.probability[:first])
    best.update(torch.logit(odds), rows.labels[:first])
    (folder / "best").write_text(str(best.compute()["auc"]), encoding="utf-8")
    (folder / "tables").write_text(" ".join(map(str, cardinalities)), encoding="utf-8")
    return folder


def measure(
    records: Records, parts: list[str], repeats: int, quick: bool, python: Path
) -> Iterator[str]:
    """Measures parts, and yields a line a case."""
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            wanted = cases(part, quick)
            data = str(generate(wanted[0].shape, Path(folder))) if part == "until" else ""
            for seed, plain in itertools.product(range(repeats), wanted):
                case = dataclasses.replace(plain, data=data, seed=seed)
                record = records.record(part, case)
                record.skipped = obstacle(case, python)
                if record.skipped:
                    yield f"{part}/{case.name}  {record.skipped}"
                    continue
                figures = run(case, python=str(python) if case.name in PEERS else sys.executable)
                record.runs.append(figures)
                shown = "  ".join(f"{key} {value:,.4g}" for key, value in figures.items())
                yield f"{part}/{record.label}  {shown}"


def quality(data: Path, python: Path) -> dict[str, list[Figures]]:
    """Returns what `benchmarks.peers.quality` prints, a run each, by model."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [str(python), "-m", "benchmarks.peers.quality", str(data.absolute())],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, list[Figures]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks; returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.run", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part instead of all")
    parser.add_argument("--quality", type=Path, metavar="DATA", help="FuxiCTR on Frappe alone")
    parser.add_argument("--render", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="processes per case")
    parser.add_argument("--quick", action="store_true", help="tiny tables, to try it out")
    parser.add_argument("--python", type=Path, default=PYTHON, help="of the peers' environment")
    parser.add_argument("--out", type=Path, help="folder of the page and the plot")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / ("build/benchmarks" if options.quick else "docs/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    records = Records.load(out)
    if options.quality:
        records.quality = quality(options.quality, options.python)
    elif not options.render:
        parts = options.only or list(PARTS)
        records = records.without(parts)
        records.machine, records.versions = machine(), page.versions(LOCK)
        for line in measure(records, parts, options.repeats, options.quick, options.python):
            print(line, flush=True)
            records.write(out)
    print(page.write(records, out))
    print(f"written to {out}")
    failed = [claim for claim in page.claims(records) if not claim.holds]
    return 1 if failed and not (options.quick or options.render or options.quality) else 0


if __name__ == "__main__":
    sys.exit(main())
