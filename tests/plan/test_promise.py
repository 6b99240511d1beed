"""Plans by the AUC that they may lose hold to what is measured, not to what is predicted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys_compress.cli import run
from recsys_compress.compress import Policy
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.policy import make_rule
from recsys_compress.config import Job, dump_job
from recsys_compress.plan.candidates import alone, lowered, size_of
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.planner import Prepared, make_plan, plan_within, prepare
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.train.events import Metrics
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group
from recsys_compress.train.trainer import train
from tests.plan.jobs import request_of
from tests.serve.clicks import prepared
from tests.train.jobs import make_job

ASKED = 0.004
Planner = Callable[[Callable[[int], float]], Plan]


@pytest.fixture(scope="module")
def common(job: Job, reference: Path) -> Prepared:
    with process_group():
        return prepare(job, request_of(reference, max_auc_loss=ASKED))


@pytest.fixture(scope="module")
def plan_by_auc(job: Job, common: Prepared) -> Planner:
    """Makes plans where the AUC that is measured to be lost is told by their bytes."""
    quality = common.quality
    assert quality is not None
    before = quality.auc(0.0)

    def plan(lost: Callable[[int], float]) -> Plan:
        def measure(policy: Policy) -> Metrics:
            sizes = size_of(lowered(common.tables, policy), job.train.optimizer)
            return {"auc": before - lost(sizes.training), "logloss": 0.5}

        with process_group():
            return plan_within(dataclasses.replace(common, measure=measure), common.request)

    return plan


def test_full_tables_lose_nothing(job: Job, common: Prepared) -> None:
    assert common.quality is not None
    assert common.measure is not None
    with process_group():
        full = common.measure(alone(Full(), make_rule("full", job.embedding).options))
    assert common.quality.auc(0.0) == pytest.approx(full["auc"], abs=1e-9)


def test_rows_count_by_their_weights_as_in_training(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    run = train(make_job(dataset, tmp_path / "runs", "full", epochs=1, threads=1))
    with process_group():
        built, _ = load_run(run.folder)
        quality = AucByLoss.of(built, dataset)
    assert quality.auc(0.0) == pytest.approx(run.valid["auc"], abs=1e-9)
    assert quality.logloss == pytest.approx(run.valid["logloss"], abs=1e-9)


def test_what_is_measured_to_lose_too_much_is_made_larger(plan_by_auc: Planner) -> None:
    first = plan_by_auc(lambda _: ASKED / 2)
    assert [trial.way.name for trial in first.trials] == ["plan"]
    # Bytes that lose as much as was asked for.
    least = (2 * first.sizes.training + first.full.training) // 3
    plan = plan_by_auc(lambda size: ASKED * (least / size) ** 3)
    sizes = [trial.way.sizes.training for trial in plan.trials]
    assert sizes[0] == first.sizes.training
    assert 2 <= len(sizes) <= 6
    assert len(set(sizes)) == len(sizes)
    assert plan.sizes.training == min(size for size in sizes if size >= least)
    assert plan.sizes.training < plan.full.training
    assert plan.lost_auc is not None
    assert plan.lost_auc <= ASKED
    assert plan.warning is None
    assert plan.file.summary["lost_auc"] == plan.lost_auc
    assert plan.choice.cost == pytest.approx(plan.sizes.training, abs=16)  # of step counts
    assert {name for tables in plan.dishes for name in tables} == set(plan.worths)


def test_what_loses_nothing_is_tried_before_it_is_said_that_none_holds(
    plan_by_auc: Planner,
) -> None:
    full = plan_by_auc(lambda _: 0.0).full.training
    plan = plan_by_auc(lambda size: 0.0 if size >= full else 1.01 * ASKED)
    assert plan.sizes.training == full
    assert plan.warning is None


def test_the_closest_is_planned_where_none_holds_and_says_so(
    plan_by_auc: Planner,
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = plan_by_auc(lambda size: 1.5 * ASKED + 1 / size)
    assert plan.sizes.training == max(trial.way.sizes.training for trial in plan.trials)
    assert 2 <= len(plan.trials) <= 6
    warning = plan.file.summary["warning"]
    assert "more than the 0.004 asked for" in warning
    monkeypatch.setattr("recsys_compress.plan.planner.make_plan", lambda *_: plan)
    (tmp_path / "job.toml").write_text(dump_job(job))
    command = ("plan", str(tmp_path / "job.toml"), "--max-auc-loss", str(ASKED), "--dry-run")
    assert run([*command, "--reference", str(plan.request.reference)]) == 0
    out, err = capsys.readouterr()
    assert f"note: this plan {warning}\n" in err
    assert "0.004 asked for" in out


def test_a_run_is_measured_to_lose_what_was_asked_at_most(job: Job, reference: Path) -> None:
    plan = make_plan(job, request_of(reference, max_auc_loss=0.002))
    assert plan.lost_auc is not None
    assert plan.lost_auc <= 0.002
    assert plan.warning is None
