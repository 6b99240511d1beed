"""Plans for several processes; none but this one is needed."""

import dataclasses
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from recsys_compress.config import ShardingConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.planner import Prepared, make_plan, plan_within, prepare
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.ranks import FullestRank, largest_that_fits
from recsys_compress.plan.report import plain, render
from recsys_compress.plan.request import Request
from tests.train.jobs import EMBEDDINGS, make_job

METHODS = ("full", "low_rank", "hash")


@pytest.fixture(scope="module")
def common(
    synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    job = make_job(synthetic_dataset, tmp_path_factory.mktemp("runs"), "full", threads=1)
    settings = {"optimizer": "rowwise_adagrad", "dim": 16, "min_rows": 0}
    fused = replace(EMBEDDINGS["adagrad"], **settings)
    # TorchRec's planner counts buffers for a batch, which are more than tables as small as these.
    few = replace(job.train, batch_size=8)
    job = replace(job, embedding=fused, train=few)
    return prepare(job, Request(budget="1x", methods=METHODS))


def plan_of(
    common: Prepared,
    world_size: int,
    *,
    budget: str = "0.5x",
    hbm: str | None = None,
    **sharding: object,
) -> tuple[Plan, FullestRank]:
    """Returns a plan and its fullest process."""
    job = replace(common.job, sharding=ShardingConfig(**sharding))  # type: ignore[arg-type]
    request = Request(budget=budget, methods=METHODS, world_size=world_size, hbm=hbm)
    plan = plan_within(replace(common, job=job), request)
    assert plan.fullest is not None
    return plan, plan.fullest


def shown(plan: Plan) -> str:
    """Returns what is printed of a plan."""
    console = Console(width=200, record=True, file=io.StringIO())
    for table in render(plan):
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("world_size", [2, 8])
def test_rows_divided_take_a_share_of_each_process(world_size: int, common: Prepared) -> None:
    plan, found = plan_of(common, world_size, kind="row_wise")
    # Rows are rounded up for each table; projections and maps of ids are in all processes.
    share = plan.sizes.training / world_size
    assert share <= found.training < 1.2 * share
    _, whole = plan_of(common, world_size, kind="table_wise")
    assert found.training < whole.training <= plan.sizes.training
    _, alone = plan_of(common, 1)
    assert alone.training == plan.sizes.training


def test_what_dense_optimizers_train_is_in_every_process(common: Prepared) -> None:
    dense = replace(EMBEDDINGS["adagrad"], dim=8, optimizer="adam", learning_rate=0.01)
    job = replace(common.job, embedding=dense)
    plan = make_plan(job, Request(budget="0.5x", methods=METHODS, world_size=8))
    assert plan.fullest is not None
    assert plan.fullest.parameters == plan.sizes.parameters
    assert plan.fullest.optimizer == plan.sizes.optimizer


@pytest.mark.parametrize("kind", ["auto", "row_wise"])
@pytest.mark.parametrize("world_size", [2, 8])
def test_a_plan_is_made_smaller_until_it_fits(kind: str, world_size: int, common: Prepared) -> None:
    large, fullest = plan_of(common, world_size, budget="1x", hbm="80GiB", kind=kind)
    assert fullest.memory == 80 * 2**30
    assert large.budget == large.asked
    hbm = str(7 * fullest.training // 10)
    small, found = plan_of(common, world_size, budget="1x", hbm=hbm, kind=kind)
    assert found.training <= int(hbm)
    assert found.training > 0.5 * int(hbm)  # plans come in steps
    assert small.asked == large.asked
    assert small.budget is not None
    assert small.budget < large.sizes.training
    assert small.sizes.training <= small.budget
    # What processes cost at most is part of the gap.
    assert small.loss > large.loss
    assert small.choice.gap >= small.loss - large.loss
    assert f"processes cannot hold plans of the {large.asked:,} asked for" in shown(small)


def test_more_bytes_are_shown_where_processes_can_hold_them(common: Prepared) -> None:
    plan, fullest = plan_of(common, 2, kind="row_wise")
    assert plan.more is not None
    assert plan.more[0] > plan.sizes.training
    tight, _ = plan_of(common, 2, kind="row_wise", hbm=str(fullest.training))
    assert tight.sizes == plan.sizes
    assert tight.more is None
    assert "nothing: processes cannot hold them" in shown(tight)
    assert plain(tight)["more_bytes"] is None


def test_a_plan_by_auc_is_not_made_smaller(common: Prepared) -> None:
    quality = AucByLoss(rises=np.array([0.0, 1.0]), aucs=np.array([0.9, 0.5]), logloss=0.5)
    request = Request(
        max_auc_loss=1e-6, grade="reference", reference=Path("run"), methods=METHODS, world_size=2
    )
    sharding = ShardingConfig(kind="row_wise", host_memory="50kB")
    given = replace(common, quality=quality, job=replace(common.job, sharding=sharding))
    with pytest.raises(UserError, match=r"fullest of 2 .*; --budget \d+ fits"):
        plan_within(given, request)


def test_memory_too_small_for_any_plan(common: Prepared) -> None:
    with pytest.raises(UserError, match=r"fullest of 2 .*; no smaller plan fits either"):
        plan_of(common, 2, kind="row_wise", host_memory=200)
    with pytest.raises(UserError, match=r"do not fit 8 processes.*; no smaller plan fits either"):
        plan_of(common, 8, hbm="300")


def test_what_is_asked_must_make_sense(common: Prepared) -> None:
    with pytest.raises(UserError, match="--world-size 0: must be positive"):
        plan_of(common, 0)
    with pytest.raises(UserError, match="give their number, --world-size"):
        Request(budget="0.5x", hbm="80GiB")
    with pytest.raises(UserError, match="size 'much' is not understood"):
        plan_of(common, 2, hbm="much")


def test_the_fullest_process_is_shown(common: Prepared) -> None:
    plan, found = plan_of(common, 8)
    assert plain(plan)["fullest_rank"] == {**dataclasses.asdict(found), "training": found.training}
    assert f"training {found.training:,} of {found.memory:,}" in shown(plan)
    assert plan.file.summary["fullest_rank"]["world_size"] == 8


def test_the_largest_budget_that_fits() -> None:
    found = largest_that_fits(lambda budget: budget <= 5000, 10, 1_000_000)
    assert found is not None
    assert 4950 < found <= 5000
    assert largest_that_fits(lambda _: False, 10, 100) is None
    assert largest_that_fits(lambda budget: budget <= 10, 10, 11) == 10
