"""Budget plans on real and generated data: `python -m benchmarks.plan --data PATH`.

For each seed a model of full tables is trained (or taken from the study's own runs; that of
generated data is the demonstration's). Then

* points: one table at a time is compressed, and the validation logloss measured, against what the
  grade "reference" predicts for it;
* plans: at several budgets the plan's tables take the trained ones over, as do those of every
  uniform policy, one method and storage type for all tables; validation picks the best of these.

Nothing is trained for these after the first model, so that all start from the same. On MovieLens-1M
alone, single tables are measured, and plans by probes trained from scratch. The figures are kept in
`docs/benchmarks/plan.json`, from which the page and its plot are written.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.case import ROOT
from benchmarks.plan_page import write
from benchmarks.takeover import BUDGETS, SETTINGS, blind, plans
from recsys_compress.compare.cells import first_cell, run_of
from recsys_compress.compare.runner import Memory, Runner
from recsys_compress.compare.study import load_study
from recsys_compress.compress.method import Trained, Values
from recsys_compress.compress.policy import make_rule
from recsys_compress.config import load_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.data.split import Split
from recsys_compress.demo import demo
from recsys_compress.files import to_json, write_text
from recsys_compress.plan.candidates import (
    STORAGE,
    Purpose,
    Wanted,
    candidate,
    methods_for,
)
from recsys_compress.plan.curves import changed
from recsys_compress.plan.menu import METHODS
from recsys_compress.plan.planner import Prepared, plan_within, prepare
from recsys_compress.plan.reference import read_reference
from recsys_compress.plan.request import Request
from recsys_compress.train.build import Built
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.events import Metrics, RunResult
from recsys_compress.train.memory import memory_bytes
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group
from recsys_compress.train.trainer import train

FIGURES = "plan.json"
MOVIELENS = "movielens_1m"
SYNTHETIC = "synthetic"
SETS = (MOVIELENS, "frappe", SYNTHETIC)
PURPOSES: tuple[Purpose, ...] = ("training", "serving")
PARTS = ("points", *PURPOSES, "data", "probes")
POINTS = 3  # knobs of each table and method that are measured


Rows = Sequence[Mapping[str, Any]]
Measure = Callable[[Path, str, Rows], Iterator[Mapping[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what has no figures yet and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="of data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "plans", help="for trainings")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--render", action="store_true", help="write the page alone")
    options = parser.parse_args(arguments)
    path = options.out / FIGURES
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = {(record["data"], record["what"], record["seed"]): record for record in kept}
    torch.set_num_threads(1)
    for data in [] if options.render else options.sets:
        parts = _parts(options.runs)
        if data != MOVIELENS:
            parts = {what: parts[what] for what in PURPOSES}
        for seed in options.seeds:
            folder = _folder(data, seed, options)
            for what in [what for what in options.parts if what in parts]:
                if what == "points" and seed != options.seeds[0]:
                    continue
                new = {"data": data, "what": what, "seed": seed, "rows": []}
                record = found.setdefault((data, what, seed), new)
                for row in parts[what](folder, data, list(record["rows"])):
                    record["rows"].append(row)
                    lines = [to_json(found[key]) for key in sorted(found)]
                    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
                    progress = f"{data} {what} seed {seed}: {len(record['rows'])}"
                    print(progress, file=sys.stderr, flush=True)
    write(list(found.values()), options.out / "plan.md")


def _parts(runs: Path) -> dict[str, Measure]:
    """Returns what yields the rows of each part that are not among those kept."""
    return {
        "points": lambda folder, _, kept: points(folder) if not kept else iter(()),
        "training": lambda folder, data, kept: plans(folder, data, "training", len(kept)),
        "serving": lambda folder, data, kept: plans(folder, data, "serving", len(kept)),
        "data": lambda folder, data, kept: blind(folder, data, len(kept)),
        "probes": lambda folder, _, kept: probed(folder, kept, runs),
    }


def _folder(data: str, seed: int, options: argparse.Namespace) -> Path:
    """Returns the folder of the run of full tables, which is trained unless it is kept."""
    if data == SYNTHETIC:
        out = options.runs / f"{SYNTHETIC}-s{seed}"
        kept = list(out.glob("runs/*/result.json"))
        return (
            kept[0].parent
            if kept
            else demo(out, source=Synthetic(seed=seed), budgets=()).runs[0].folder
        )
    study = load_study(ROOT / "studies" / f"{data}.toml")
    run = run_of(study, first_cell(study, "full", "dcnv2"), {})
    runner = Runner(
        study=study,
        work=options.work / data,
        data=options.data,
        memory=Memory(memory_bytes()),
        threads=1,
    )
    runner.prepare(seed)
    return cast("Path", run and runner.trained(run, seed))


def points(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yields predicted and measured rises of the logloss where one table is compressed."""
    job = load_job(folder / "job.toml", SETTINGS)
    with process_group():
        built, dataset = load_run(folder, SETTINGS)
        evidence = read_reference(job, dataset, folder).evidence
        trained = cast("Trained", evidence.trained)
        tables = built.embeddings.embedding_bag_configs()
        before = _figures(built, "valid")
        for table in tables:
            for name in METHODS:
                rule = make_rule(name, dataclasses.replace(job.embedding, budget=None))
                wanted = Wanted(rule=rule, is_fixed=name == "full")
                knobs = list(methods_for([table], wanted, trained, adopting=True))
                storage = STORAGE if name == "full" else STORAGE[:1]
                for method, values in knobs[:: max(1, len(knobs) // POINTS)]:
                    options = rule.options
                    dishes = candidate([table], method, options, job.train.optimizer, storage)
                    estimates = evidence.estimates([table], dishes, values)
                    vectors = changed([table], dishes, values or Values())
                    for dish, estimate, new in zip(dishes, estimates, vectors, strict=True):
                        if not estimate.loss:
                            continue  # it is the trained table
                        with _replaced(built, trained.vectors, new):
                            after = _figures(built, "valid")
                        yield {
                            "table": table.name,
                            "method": name,
                            "label": dish.label,
                            "bytes": dish.sizes.serving,
                            "predicted": estimate.loss,
                            "error": estimate.error,
                            "measured": after["logloss"] - before["logloss"],
                            "lost_auc": before["auc"] - after["auc"],
                        }


class _replaced:  # noqa: N801
    """Gives a model of full tables other vectors, for a while."""

    def __init__(
        self, built: Built, vectors: Callable[[str], Tensor], new: Mapping[str, Tensor]
    ) -> None:
        self._built, self._vectors, self._new = built, vectors, new

    def __enter__(self) -> None:
        self._write(self._new)

    def __exit__(self, *_: object) -> None:
        self._write({name: self._vectors(name) for name in self._new})

    def _write(self, vectors: Mapping[str, Tensor]) -> None:
        built = self._built
        assignments = built.policy.assign(built.embeddings.embedding_bag_configs())
        values = [
            Values(tables={t.name: vectors[t.name] for t in a.tables if t.name in vectors})
            for a in assignments
        ]
        built.embeddings.write(values, built.table_weights())


def probed(
    folder: Path, kept: Sequence[Mapping[str, Any]], runs: Path
) -> Iterator[Mapping[str, Any]]:
    """Yields the figures of plans by probes, trained from scratch, that are not kept."""
    job = load_job(folder / "job.toml", (*SETTINGS, f"train.output={json.dumps(str(runs))}"))
    common: Prepared | None = None
    for name, budget in reversed(BUDGETS.items()):
        if name in {row["budget"] for row in kept}:
            continue
        request = Request(budget=budget, grade="probes", reference=folder, methods=METHODS)
        common = common or prepare(job, request)
        plan = plan_within(common, request)
        path = runs / "plans" / f"{name.replace('/', '-')}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.file.write(path)
        embedding = dataclasses.replace(job.embedding, plan=str(path), budget=None)
        result = train(dataclasses.replace(job, embedding=embedding))
        yield {
            "budget": name,
            "way": plan.way.name,
            "predicted": plan.loss,
            "tables": [dish.candidate.label for dish in plan.dishes.values()],
            **_figures_of(result),
        }


def _figures_of(result: RunResult) -> dict[str, float]:
    """Returns what is kept of a training."""
    return {
        "bytes": int(result.bytes["tables"] + result.bytes["optimizer"]),
        "valid.auc": round(result.valid["auc"], 6),
        "test.auc": round(result.test["auc"], 6),
    }


def _figures(built: Built, split: Split) -> Metrics:
    """Returns the metrics of a run's model."""
    dataset = PreparedDataset.open(built.job.data.path)
    reader = Reader(dataset, split, batch_size=built.job.train.eval_batch_size)
    return evaluate(built.model, reader, built.device).compute()


if __name__ == "__main__":
    main()
