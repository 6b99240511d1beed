"""Budget plans on MovieLens-1M: `python -m benchmarks.plan --data PATH`.

For each seed a model of full tables is trained (or taken from the quality study's folder). Then

* points: one table at a time is compressed, and the validation logloss measured, against what the
  grade "reference" predicts for it;
* plans: at several budgets the plan's tables take the trained ones over, as do those of every
  uniform policy, one method and storage type for all tables; validation picks the best of these.

Nothing is trained after the first model, so that all start from the same. The figures are kept in
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

from benchmarks.study.cells import MOVIELENS, by_name
from benchmarks.study.plan_page import write
from benchmarks.study.runs import ROOT, Runs
from recsys_compress.compress import Policy, StoragePlan, quantize
from recsys_compress.compress.method import Method, Trained, Values
from recsys_compress.compress.policy import full_bytes, make_rule, resolve
from recsys_compress.compress.size import DataType
from recsys_compress.config import EmbeddingConfig, Job, budget_bytes, load_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError
from recsys_compress.files import to_json, write_text
from recsys_compress.plan.candidates import (
    STORAGE,
    Purpose,
    Wanted,
    alone,
    candidate,
    lowered,
    methods_for,
    size_of,
)
from recsys_compress.plan.curves import changed
from recsys_compress.plan.menu import METHODS
from recsys_compress.plan.planner import Prepared, Request, plan_within, prepare
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.reference import read_reference
from recsys_compress.train.build import Built, build, logical_tables
from recsys_compress.train.build import lowered as lowered_job
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.events import Metrics, RunResult
from recsys_compress.train.handover import hand_over
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group
from recsys_compress.train.trainer import train

FIGURES = "plan.json"
BUDGETS = {"1/2": "0.5x", "1/5": "0.2x", "1/10": "0.1x", "1/30": "0.0333x", "1/100": "0.01x"}
PURPOSES: tuple[Purpose, ...] = ("training", "serving")
SETTINGS = ("embedding.methods.dynamic_sparse.block=2", "train.threads=1")
PARTS = ("points", *PURPOSES, "data", "trained", "probes")
POINTS = 3  # knobs of each table and method that are measured
SCRATCH = ("low_rank", "quotient_remainder", "unified")  # what a uniform policy is trained with
TYPES: tuple[DataType, ...] = ("fp32", "int8", "int4")  # of uniform policies that are served
_FACTOR = 1.07  # between sizes of uniform policies


Measure = Callable[[Path, list[Mapping[str, Any]]], Iterator[Mapping[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what has no figures yet and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "plans", help="for trainings")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--render", action="store_true", help="write the page alone")
    options = parser.parse_args(arguments)
    path = options.out / FIGURES
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = {(record["what"], record["seed"]): record for record in kept}
    runs = Runs(data=options.data, work=options.work)
    torch.set_num_threads(1)
    parts: dict[str, Measure] = {"points": lambda folder, _: points(folder)}
    parts |= {purpose: _plans(purpose) for purpose in PURPOSES}
    parts["data"] = lambda folder, _: blind(folder)
    parts["probes"] = lambda folder, rows: probed(folder, rows, options.runs)
    parts["trained"] = lambda folder, rows: trained(folder, rows, options.runs)
    for seed in [] if options.render else options.seeds:
        runs.prepare(MOVIELENS, seed)
        folder = runs.folder(by_name(f"{MOVIELENS}-full"), seed)
        for what in options.parts:
            if what == "points" and seed != options.seeds[0]:
                continue
            record = found.setdefault((what, seed), {"what": what, "seed": seed, "rows": []})
            if record["rows"] and what not in ("trained", "probes"):
                continue
            for row in parts[what](folder, list(record["rows"])):
                record["rows"].append(row)
                lines = [to_json(found[key]) for key in sorted(found)]
                write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
                print(f"{what} seed {seed}: {len(record['rows'])}", file=sys.stderr, flush=True)
    write(list(found.values()), options.out / "plan.md")


def points(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yields predicted and measured rises of the logloss where one table is compressed."""
    job = load_job(folder / "job.toml", SETTINGS)
    with process_group():
        built, dataset = load_run(folder, SETTINGS)
        evidence, _ = read_reference(job, dataset, folder)
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


def _plans(purpose: Purpose) -> Measure:
    return lambda folder, _: plans(folder, purpose)


def plans(folder: Path, purpose: Purpose) -> Iterator[Mapping[str, Any]]:
    """Yields the figures of plans and of uniform policies at all budgets."""
    job = load_job(folder / "job.toml", SETTINGS)
    full: Metrics | None = None
    common: Prepared | None = None
    for name, budget in BUDGETS.items():
        request = Request(
            purpose=purpose,
            budget=budget,
            grade="reference",
            reference=folder,
            methods=METHODS,
        )
        common = common or prepare(job, request)
        full = full or _adopted(job, folder, alone_of(job, "full"))
        rows: list[dict[str, Any]] = []
        try:
            plan = plan_within(common, request)
        except UserError as error:
            yield {"budget": name, "error": str(error)}
            continue
        figures = _adopted(job, folder, plan.policy)
        quality, within = cast("AucByLoss", plan.quality), cast("int", plan.budget)
        rows.append(
            {
                "policy": "plan",
                "bytes": plan.sizes.of(purpose),
                "predicted": plan.loss,
                "predicted_auc": quality.auc(plan.loss),
                "tables": [d.candidate.label for d in plan.dishes.values()],
                **figures,
            }
        )
        for policy, label, size in _uniform(common, within, purpose):
            rows.append({"policy": label, "bytes": size, **_adopted(job, folder, policy)})
        yield {"budget": name, "budget_bytes": within, "full": full, "rows": rows}


def blind(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the figures of plans from the data alone, whose tables take the trained ones over."""
    job = load_job(folder / "job.toml", SETTINGS)
    common: Prepared | None = None
    for name, budget in BUDGETS.items():
        request = Request(budget=budget, grade="data", methods=METHODS)
        common = common or prepare(job, request)
        try:
            plan = plan_within(common, request)
        except UserError as error:
            yield {"budget": name, "error": str(error)}
            continue
        tables = [dish.candidate.label for dish in plan.dishes.values()]
        figures = _adopted(job, folder, plan.policy)
        yield {"budget": name, "bytes": plan.sizes.training, "tables": tables, **figures}


def trained(
    folder: Path, kept: Sequence[Mapping[str, Any]], runs: Path
) -> Iterator[Mapping[str, Any]]:
    """Yields the figures of trainings at all budgets that are not among those kept.

    Plans are trained from the run's tables on, as long as the run was; uniform policies, which are
    fitted to the same bytes, from scratch.
    """
    job = load_job(folder / "job.toml", (*SETTINGS, f"train.output={json.dumps(str(runs))}"))
    done = {(row["budget"], row["policy"]) for row in kept}
    common: Prepared | None = None
    for name, budget in reversed(BUDGETS.items()):  # most is at stake at the smallest
        request = Request(budget=budget, grade="reference", reference=folder, methods=METHODS)
        if (name, "plan") not in done:
            common = common or prepare(job, request)
            policy = plan_within(common, request).policy
            with process_group():
                before, dataset = load_run(folder, SETTINGS)
                tables = before.embeddings.embedding_bag_configs()
                start = hand_over(before, dataset, tables, policy)
            yield {"budget": name, "policy": "plan", **_figures_of(train(job, start=start))}
        for method in SCRATCH:
            if (name, method) in done:
                continue
            found = _fitted(job, method, budget)
            if found is not None:
                result = train(dataclasses.replace(job, embedding=found))
                yield {"budget": name, "policy": method, **_figures_of(result)}


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
        embedding = dataclasses.replace(job.embedding, plan=str(path))
        result = train(dataclasses.replace(job, embedding=embedding))
        yield {
            "budget": name,
            "policy": "plan by probes, from scratch",
            "predicted": plan.loss,
            "tables": [dish.candidate.label for dish in plan.dishes.values()],
            **_figures_of(result),
        }


def _fitted(job: Job, method: str, budget: str) -> EmbeddingConfig | None:
    """Returns the settings of a method for all tables, fitted to training bytes; None for none."""
    schema = PreparedDataset.open(job.data.path).schema
    full = size_of(lowered_job(job, schema, alone_of(job, "full")), job.train.optimizer)
    most = budget_bytes(budget, full.training)
    tables = logical_tables(schema, job.embedding.dim)
    for size in _sizes(full_bytes(tables)):
        embedding = dataclasses.replace(job.embedding, method=method, budget=size)
        try:
            policy = resolve(embedding, tables)
        except UserError:
            continue
        taken = size_of(lowered_job(job, schema, policy), job.train.optimizer)
        if taken.training <= most:
            return embedding
    return None


def _figures_of(result: RunResult) -> dict[str, float]:
    """Returns what is kept of a training."""
    return {
        "bytes": int(result.bytes["tables"] + result.bytes["optimizer"]),
        "valid.auc": round(result.valid["auc"], 6),
        "test.auc": round(result.test["auc"], 6),
    }


def alone_of(job: Job, name: str) -> Policy:
    """Returns the policy of one method for all tables."""
    rule = make_rule(name, dataclasses.replace(job.embedding, budget=None))
    return alone(rule.method, rule.options)


def _uniform(common: Prepared, budget: int, purpose: Purpose) -> Iterator[tuple[Policy, str, int]]:
    """Yields for each method and storage type the largest uniform policy within a budget."""
    job, tables = common.job, common.tables
    embedding = dataclasses.replace(job.embedding, budget=None)
    for name in METHODS:
        rule = make_rule(name, embedding)
        for storage in TYPES if purpose == "serving" else TYPES[:1]:
            options = dataclasses.replace(rule.options, storage=storage)
            method: Method = rule.method.in_one_stage(adopting=True)
            for size in _sizes(full_bytes(tables)):
                policy = Policy(
                    default=dataclasses.replace(rule, method=method, options=options),
                    min_rows=embedding.min_rows,
                )
                try:
                    policy = policy if name == "full" else policy.fit(tables, size)
                    taken = size_of(lowered(tables, policy), job.train.optimizer).of(purpose)
                except UserError:
                    continue
                if taken <= budget:
                    yield policy, f"{name} {storage}", taken
                    break


def _sizes(most: int) -> Iterator[int]:
    size = float(most)
    while size > most / 300:
        yield int(size)
        size /= _FACTOR


def _adopted(job: Job, folder: Path, policy: Policy) -> dict[str, float]:
    """Returns figures of a model whose tables took a run's over, as they are served."""
    with process_group():
        before, dataset = load_run(folder, SETTINGS)
        tables = before.embeddings.embedding_bag_configs()
        start = hand_over(before, dataset, tables, policy)
        built = build(job, dataset.schema, start.policy)
        start.write(built)
        served = StoragePlan.planned(built.embeddings)
        stored = quantize(built.embeddings, served, built.table_weights())
        model = built.model.module
        model.embeddings = stored
        found = {}
        for split in ("valid", "test"):
            reader = Reader(dataset, split, batch_size=job.train.eval_batch_size)
            metrics = evaluate(model, reader, built.device).compute()
            found |= {f"{split}.{name}": metrics[name] for name in ("auc", "logloss")}
    return {name: round(value, 6) for name, value in found.items()}


def _figures(built: Built, split: Split) -> Metrics:
    """Returns the metrics of a run's model."""
    dataset = PreparedDataset.open(built.job.data.path)
    reader = Reader(dataset, split, batch_size=built.job.train.eval_batch_size)
    return evaluate(built.model, reader, built.device).compute()


if __name__ == "__main__":
    main()
