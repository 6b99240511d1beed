"""Rules of the job that make one thing of several tables are kept by plans."""

import dataclasses
from pathlib import Path

import pytest

from recsys_compress.compress.planned import PlanFile
from recsys_compress.config import Job, RuleConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.planner import make_plan
from recsys_compress.plan.request import Request
from recsys_compress.train.build import logical_tables
from tests.plan.jobs import FEW, request_of

BOTH = ("field_2", "field_3")


def ruled(job: Job, method: str, **knobs: object) -> Job:
    """Returns the job with a rule for two of its tables."""
    rules = (RuleConfig(table="field_[23]", method=method),)
    methods = {method: knobs} if knobs else {}
    embedding = dataclasses.replace(job.embedding, rules=rules, methods=methods)
    return dataclasses.replace(job, embedding=embedding)


def row_of(plan: Plan) -> dict[str, object]:
    """Returns what is planned for both tables, which must be one thing."""
    (row,) = [row for row in plan.file.tables if set(row["tables"]) & set(BOTH)]
    assert tuple(row["tables"]) == BOTH
    assert "embedding.rules" in row["reason"]
    return row


@pytest.mark.parametrize("grade", ["data", "reference"])
@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("unified", {}),
        ("unified", {"num_embeddings": 50}),
        ("dynamic_sparse", {}),
        ("dynamic_sparse", {"density": 0.2}),
        ("low_rank", {"rank": {"field_2": 3, "field_3": 2}}),
    ],
)
def test_tables_of_a_rule_are_one_where_its_method_makes_one_of_them(
    method: str, knobs: dict[str, object], grade: str, job: Job, reference: Path, tmp_path: Path
) -> None:
    changed = ruled(job, method, **knobs)
    request = Request(budget="0.5x", methods=FEW)
    if grade == "reference":
        request = request_of(reference, budget="0.5x")
    plan = make_plan(changed, request)
    assert row_of(plan)["method"] == method
    assert plan.sizes.training <= (plan.budget or 0)
    tables = logical_tables(PreparedDataset.open(job.data.path).schema, job.embedding.dim)
    plan.file.write(tmp_path / "plan.toml")
    policy = PlanFile.read(tmp_path / "plan.toml").policy(
        tables, plan.policy.rules[0].options, where="plan"
    )
    (own,) = [a for a in policy.assign(tables) if {t.name for t in a.tables} & set(BOTH)]
    for name, value in knobs.items():
        assert getattr(own.rule.method, name) == value
    if method != "low_rank":  # whose tables share nothing
        (shared,) = own.rule.method.lower(own.tables).tables
        assert shared.members == BOTH


def test_widths_follow_from_all_tables_of_a_rule(job: Job, reference: Path) -> None:
    changed = ruled(job, "mixed_dim", rounding="none")
    plan = make_plan(changed, Request(budget="0.7x", methods=FEW))
    row = row_of(plan)
    assert row["method"] == "mixed_dim"
    full = sum(plan.file.rows[name] for name in BOTH) * job.embedding.dim * 4
    assert row["parameters"] < full  # type: ignore[operator]
    with pytest.raises(UserError, match=r"'field_2', 'field_3': .* \(mixed_dim\) suits them"):
        make_plan(changed, request_of(reference, budget="0.7x"))
