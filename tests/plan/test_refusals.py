"""What cannot be planned, and what a plan cannot be used for: one clear line each."""

import dataclasses
from pathlib import Path

import pytest

from recsys_compress.compress.planned import PlanFile
from recsys_compress.config import Job, RuleConfig
from recsys_compress.data.prepare import prepare as prepare_data
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError
from recsys_compress.plan.planner import make_plan
from recsys_compress.plan.request import Request
from recsys_compress.train.trainer import train
from tests.plan.jobs import FEW, planned, request_of


def test_vectors_of_another_width_cannot_take_a_run_over(job: Job, reference: Path) -> None:
    narrow = {"methods": {"unified": {"num_probes": 2, "probe_dim": 2}}}
    embedding = dataclasses.replace(job.embedding, **narrow)
    changed = dataclasses.replace(job, embedding=embedding)
    plan = make_plan(changed, request_of(reference, budget="1.1x", methods=("full", "unified")))
    assert {row["method"] for row in plan.file.tables} == {"full"}
    rule = RuleConfig(table="field_2", method="unified")
    with pytest.raises(UserError, match="'field_2': none of the methods"):
        make_plan(
            dataclasses.replace(job, embedding=dataclasses.replace(embedding, rules=(rule,))),
            request_of(reference, budget="0.3x"),
        )


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        ({"budget": "100B"}, {}, "out of reach: these tables take at least"),
        ({"budget": "0.5x", "max_auc_loss": 0.1}, {}, "either --budget or --max-auc-loss"),
        ({}, {}, "either --budget or --max-auc-loss"),
        ({"budget": "10zz"}, {}, "'10zz' is not understood"),
        ({"budget": "0.5x", "world_size": 0}, {}, "--world-size 0: must be positive"),
        ({"budget": "0.5x", "world_size": 2, "hbm": "big"}, {}, "'big' is not understood"),
        (
            {"budget": "0.5x", "reference": Path("none")},
            {},
            "--reference: grade 'data' looks at no",
        ),
        ({"budget": "0.5x", "trial_epochs": 2}, {}, "grade 'data' trains nothing"),
        ({"max_auc_loss": 0.1}, {}, "grade 'data' knows no AUC"),
        ({"budget": "0.5x", "methods": ("hsah",)}, {}, "'hsah' is unknown; did you mean 'hash'"),
        (
            {"budget": "0.5x"},
            {"rules": (RuleConfig(table="catt", method="full"),)},
            "no table matches 'catt'",
        ),
        (
            {"budget": "0.1x"},
            {"rules": (RuleConfig(table="field_3", method="full"),)},
            "out of reach: these tables take at least",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    request_: dict[str, object], settings: dict[str, object], message: str, job: Job
) -> None:
    embedding = dataclasses.replace(job.embedding, **settings)
    with pytest.raises(UserError, match=message):
        make_plan(
            dataclasses.replace(job, embedding=embedding), Request(**{"methods": FEW, **request_})
        )


def test_the_least_feasible_budget_is_feasible(job: Job) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(job, Request(budget="100B", methods=FEW))
    least = int(str(caught.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    # Merging saves step counts of optimizers, 4 bytes for a table.
    assert 0 <= least - make_plan(job, Request(budget=least, methods=FEW)).sizes.training <= 16
    with pytest.raises(UserError, match="out of reach"):
        make_plan(job, Request(budget=least - 1, methods=FEW))


def test_runs_and_plans_of_other_tables_are_refused(
    job: Job, reference: Path, tmp_path: Path
) -> None:
    request = Request(budget="0.5x", grade="reference", reference=reference)
    wider = dataclasses.replace(job, embedding=dataclasses.replace(job.embedding, dim=12))
    with pytest.raises(UserError, match="embedding_dim = 8 there and 12 in the job"):
        make_plan(wider, request)
    data = prepare_data(Synthetic(rows=500, cardinalities=(5, 50), dense=2), tmp_path / "data")
    other = dataclasses.replace(job, data=dataclasses.replace(job.data, path=str(data.path)))
    with pytest.raises(UserError, match=r"num_embeddings|has a table"):
        make_plan(other, request)

    plan = make_plan(job, Request(budget="0.5x", methods=FEW))
    run = planned(job, plan, tmp_path / "plan.toml")
    embedding = run.embedding
    for changed, message in (
        ({"dim": 12}, "embedding.dim = 8, the job has 12"),
        ({"optimizer": "adagrad"}, "embedding.optimizer = 'adam', the job has 'adagrad'"),
        ({"budget": "0.5x"}, "embedding.budget: cannot go with embedding.plan"),
        ({"plan": "none.toml"}, "none.toml: cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(run, embedding=dataclasses.replace(embedding, **changed)))
    with pytest.raises(UserError, match="was made for other data"):
        train(dataclasses.replace(run, data=other.data))
    text = (tmp_path / "plan.toml").read_text()
    for old, new, message in (
        ("format = 1", "format = 2", "has format 2"),
        ('method = "', 'method = "x', "is unknown"),
        ("[rows]", "rows", "is not valid TOML"),
        ("field_3", "field_9", "was made for other data"),
    ):
        (tmp_path / "plan.toml").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            train(run)


def test_blocks_that_stay_must_begin_with_a_trained_run(
    job: Job, reference: Path, tmp_path: Path
) -> None:
    given = {"budget": "0.3x", "methods": ("full", "dynamic_sparse")}
    plan = make_plan(job, request_of(reference, **given))
    assert plan.file.needs_start
    plan.file.write(tmp_path / "plan.toml")
    with pytest.raises(UserError, match="add --start"):
        PlanFile.read(tmp_path / "plan.toml").check_from_scratch("plan.toml")
    moving = make_plan(job, Request(**given))
    assert not moving.file.needs_start
    moving.file.check_from_scratch("plan.toml")
