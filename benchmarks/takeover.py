"""Plans and uniform policies that take one trained model's tables over, with nothing trained again.

Validation picks the best uniform policy; the test split is read for that one and the plan alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from recsys_compress.compress import Policy
from recsys_compress.compress.method import Method
from recsys_compress.compress.policy import full_bytes, make_rule
from recsys_compress.compress.size import DataType
from recsys_compress.config import Job, load_job
from recsys_compress.data.split import Split
from recsys_compress.errors import UserError
from recsys_compress.plan.candidates import Purpose, alone, lowered, size_of
from recsys_compress.plan.menu import METHODS
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.planner import Prepared, plan_within, prepare
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.request import Request
from recsys_compress.plan.trials import TakenOver
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group

BUDGETS = {"1/2": "0.5x", "1/5": "0.2x", "1/10": "0.1x", "1/30": "0.0333x", "1/100": "0.01x"}
SETTINGS = ("embedding.methods.dynamic_sparse.block=2", "train.threads=1")
# Vectors as wide as the model was trained with, which narrower ones cannot replace.
OWN_SETTINGS = {"frappe": ("embedding.methods.unified.probe_dim=40",)}
TYPES: tuple[DataType, ...] = ("fp32", "int8", "int4")  # of uniform policies that are served
# One knob for all tables, as published; beside it the form whose ranks evidence chooses by block.
ONE_KNOB = {"group_reduce": {"weigh_by": "frequency"}}
_FACTOR = 1.07  # between sizes of uniform policies


def figures(
    model: TakenOver, policy: Policy, splits: Sequence[Split] = ("valid", "test")
) -> dict[str, float]:
    """Returns figures of a model with its tables under a policy, as they are served."""
    found = {}
    for split in splits:
        metrics = model(policy, split)
        found |= {f"{split}.{name}": metrics[name] for name in ("auc", "logloss")}
    return {name: round(value, 6) for name, value in found.items()}


def job_of(folder: Path, data: str) -> Job:
    """Returns a run's job as it is planned here."""
    return load_job(folder / "job.toml", (*SETTINGS, *OWN_SETTINGS.get(data, ())))


def plans(folder: Path, data: str, purpose: Purpose, done: int) -> Iterator[Mapping[str, Any]]:
    """Yields the figures of plans and of uniform policies at all budgets but the first `done`."""
    job = job_of(folder, data)
    request = Request(
        purpose=purpose, budget="1x", grade="reference", reference=folder, methods=METHODS
    )
    with process_group():
        model, common = TakenOver(*load_run(folder, SETTINGS)), prepare(job, request)
        full = figures(model, alone_of(job, "full"))
        for name, plan in _planned(common, request, done):
            if isinstance(plan, UserError):
                yield {"budget": name, "error": str(plan)}
                continue
            quality, within = cast("AucByLoss", plan.quality), cast("int", plan.budget)
            mine = {
                "policy": "plan",
                "bytes": plan.sizes.of(purpose),
                "way": plan.way.name,
                "predicted": plan.loss,
                "predicted_auc": quality.auc(plan.loss),
                "tables": [dish.candidate.label for dish in plan.dishes.values()],
                **figures(model, plan.policy),
            }
            rows = [mine]
            for one_knob in (True, False):
                others = [
                    (policy, {"policy": label, "bytes": size, "one_knob": one_knob, **valid})
                    for policy, label, size in _uniform(common, within, purpose, one_knob=one_knob)
                    for valid in [figures(model, policy, ("valid",))]
                ]
                if others:
                    policy, best = max(others, key=lambda pair: float(pair[1]["valid.auc"]))
                    best |= figures(model, policy, ("test",))
                rows += [row for _, row in others]
            yield {"budget": name, "budget_bytes": within, "full": full, "rows": rows}


def blind(folder: Path, data: str, done: int) -> Iterator[Mapping[str, Any]]:
    """Yields the figures of plans from the data alone, at all budgets but the first `done`."""
    job = job_of(folder, data)
    request = Request(budget="1x", grade="data", methods=METHODS)
    with process_group():
        model, common = TakenOver(*load_run(folder, SETTINGS)), prepare(job, request)
        for name, plan in _planned(common, request, done):
            if isinstance(plan, UserError):
                yield {"budget": name, "error": str(plan)}
                continue
            tables = [dish.candidate.label for dish in plan.dishes.values()]
            found = figures(model, plan.policy.in_one_stage(adopting=True))
            yield {"budget": name, "bytes": plan.sizes.training, "tables": tables, **found}


def _planned(
    common: Prepared, request: Request, done: int
) -> Iterator[tuple[str, Plan | UserError]]:
    """Yields each budget with its plan, or why there is none."""
    for name, budget in list(BUDGETS.items())[done:]:
        found: Plan | UserError
        try:
            found = plan_within(common, dataclasses.replace(request, budget=budget))
        except UserError as error:
            found = error
        yield name, found


def alone_of(job: Job, name: str) -> Policy:
    """Returns the policy of one method for all tables."""
    rule = make_rule(name, dataclasses.replace(job.embedding, budget=None))
    return alone(rule.method, rule.options)


def sizes(most: int) -> Iterator[int]:
    """Yields the sizes that uniform policies are tried at, falling."""
    size = float(most)
    while size > most / 300:
        yield int(size)
        size /= _FACTOR


def _uniform(
    common: Prepared, budget: int, purpose: Purpose, *, one_knob: bool
) -> Iterator[tuple[Policy, str, int]]:
    """Yields for each method and storage type the largest policy of it alone within a budget.

    Args:
        common: what plans have in common.
        budget: bytes.
        purpose: which bytes count.
        one_knob: whether methods have one knob for all tables; else those of `ONE_KNOB` as they
            are by default.
    """
    job, tables = common.job, common.tables
    embedding = dataclasses.replace(job.embedding, budget=None)
    if one_knob:
        methods = {
            name: {**embedding.methods.get(name, {}), **knobs} for name, knobs in ONE_KNOB.items()
        }
        embedding = dataclasses.replace(embedding, methods={**embedding.methods, **methods})
    for name in [name for name in METHODS if one_knob or name in ONE_KNOB]:
        rule = make_rule(name, embedding)
        for storage in TYPES if purpose == "serving" else TYPES[:1]:
            options = dataclasses.replace(rule.options, storage=storage)
            method: Method = rule.method.in_one_stage(adopting=True)
            for size in sizes(full_bytes(tables)):
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
                if name == "full":
                    break
