"""Plans of a small data set: their bytes, their file, and what they hold to."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recsys_compress.compress import Policy, StoragePlan, quantize
from recsys_compress.compress.methods.full import Full
from recsys_compress.compress.planned import PlanFile
from recsys_compress.compress.policy import make_rule
from recsys_compress.config import Job, RuleConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.plan.candidates import Purpose, alone, joined
from recsys_compress.plan.plan import Plan
from recsys_compress.plan.planner import make_plan, plan_within, prepare
from recsys_compress.plan.report import plain, write_page
from recsys_compress.plan.request import Request
from recsys_compress.plan.start import start_from
from recsys_compress.serve.export import export
from recsys_compress.train.build import build, logical_tables
from recsys_compress.train.events import Metrics
from recsys_compress.train.post import load_run
from recsys_compress.train.shard import process_group
from recsys_compress.train.trainer import train
from tests.browser import browser, check_readable
from tests.plan.jobs import FEW, job_of, planned, request_of


@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_predicted_training_bytes_are_those_of_the_trained_model(
    optimizer: str, synthetic_dataset: PreparedDataset, reference: Path, tmp_path: Path
) -> None:
    job = job_of(synthetic_dataset, tmp_path, optimizer=optimizer)
    request = Request(budget="0.3x", grade="reference", reference=reference)
    plan = make_plan(job, request)
    assert plan.budget is not None
    assert 0.8 * plan.budget < plan.sizes.training <= plan.budget
    result = train(planned(job, plan, tmp_path / "plan.toml"))
    weights = load_file(result.folder / "model.safetensors")
    tables = {n: w for n, w in weights.items() if n.startswith("embeddings.")}
    assert sum(w.nbytes for w in tables.values()) == plan.sizes.parameters
    assert result.bytes["tables"] == plan.sizes.parameters
    # That the reported bytes are those of the state itself is shown in the trainer's own tests.
    assert result.bytes["optimizer"] == plan.sizes.optimizer


def test_predicted_serving_bytes_are_those_of_what_is_served(
    job: Job, reference: Path, tmp_path: Path
) -> None:
    request = request_of(reference, purpose="serving", budget="0.1x")
    plan = make_plan(job, request)
    assert plan.sizes.serving <= plan.full.serving * 0.1
    types = {dish.candidate.options.storage for dish in plan.dishes.values()}
    assert len(types) > 1, "a type for each table"
    run = planned(job, plan, tmp_path / "plan.toml")
    result = train(run, start=start_from(run, reference))
    with process_group():
        built, _ = load_run(result.folder)
        storage = StoragePlan.planned(built.embeddings)
        served = quantize(built.embeddings, storage, built.table_weights())
    assert sum(w.nbytes for w in served.state_dict().values()) == plan.sizes.serving
    artifact = export(result.folder, tmp_path / "served", None)
    assert (artifact.method, artifact.bytes["tables"]) == ("plan", plan.sizes.serving)
    stored = {
        name: table.options.storage
        for table in built.embeddings.merged_tables()
        for name in table.members
    }
    for names, dish in plan.dishes.items():
        assert {stored[name] for name in names} == {dish.candidate.options.storage}


def test_a_plan_is_what_its_file_says(
    job: Job, reference: Path, plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.toml"
    plan.file.write(path)
    tables = logical_tables(PreparedDataset.open(job.data.path).schema, job.embedding.dim)
    options = plan.policy.rules[0].options
    again = PlanFile.read(path).policy(tables, options, where="plan")
    assert again.describe(tables) == plan.policy.describe(tables)
    assert PlanFile.read(path).summary["bytes"]["training"] == plan.sizes.training
    same = make_plan(job, request_of(reference, budget="0.2x"))
    assert same.policy.describe(tables) == plan.policy.describe(tables)


def test_more_bytes_never_lose_more(job: Job, reference: Path) -> None:
    plans = [
        make_plan(job, request_of(reference, budget=budget)) for budget in ("0.05x", "0.2x", "0.6x")
    ]
    losses = [plan.trials[0].way.loss for plan in plans]  # before one method measured better
    assert losses[0] > losses[1] > losses[2]
    for plan, loss in zip(plans, losses, strict=True):
        assert plan.more is not None
        assert plan.more[1] <= loss
    assert all(loss - p.choice.bound < 1e-9 for p, loss in zip(plans, losses, strict=True))
    curve = [loss for _, loss in plans[1].curve]
    assert curve == sorted(curve, reverse=True)


def test_the_smallest_plan_within_an_auc_loss(job: Job, reference: Path) -> None:
    small, large = (
        make_plan(job, request_of(reference, max_auc_loss=lost)) for lost in (0.01, 0.001)
    )
    assert small.sizes.training < large.sizes.training < small.full.training
    for plan, lost in ((small, 0.01), (large, 0.001)):
        assert plan.quality is not None
        assert 0 <= plan.quality.auc(0) - plan.quality.auc(plan.loss) <= lost + 1e-6


def test_trials_are_of_what_training_would_begin_with(
    job: Job, reference: Path, plan: Plan, tmp_path: Path
) -> None:
    run = planned(job, plan, tmp_path / "plan.toml")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, epochs=0))
    valid = train(run, start=start_from(run, reference)).valid
    (own,) = [trial for trial in plan.trials if trial.way is plan.way]
    assert own.valid["auc"] == pytest.approx(valid["auc"], abs=1e-6)
    assert own.valid["logloss"] == pytest.approx(valid["logloss"], abs=1e-6)
    assert own.valid["auc"] == max(trial.valid["auc"] for trial in plan.trials)
    assert [row["name"] for row in plan.file.summary["trials"]] == [
        trial.way.name for trial in plan.trials
    ]


@pytest.mark.parametrize("purpose", ["training", "parameters", "serving"])
def test_a_policy_of_one_method_is_planned_where_it_measures_better(
    purpose: Purpose, job: Job, reference: Path, tmp_path: Path
) -> None:
    request = request_of(reference, purpose=purpose, budget="0.1x")
    tried: list[Policy] = []
    best = 0  # of those tried

    def measure(policy: Policy) -> Metrics:
        tried.append(policy)
        return {"auc": 0.9 - abs(len(tried) - 1 - best) / 100, "logloss": 0.5}

    with process_group():
        common = dataclasses.replace(prepare(job, request), measure=measure)
        first = plan_within(common, request)
        names = [trial.way.name for trial in first.trials]
        whole = [name for name in names if name != "plan" and "without" not in name]
        tried.clear()
        best = len(whole)
        last = plan_within(common, request)
        tried.clear()
        best = len(names) - 1
        less = plan_within(common, request)
    assert first.way.name == "plan"
    assert names == [trial.way.name for trial in last.trials]
    assert names[: 1 + len(whole)] == ["plan", *whole]
    assert 1 <= len(whole) <= 3
    losses = [trial.way.loss for trial in last.trials[: 1 + len(whole)]]
    assert losses == sorted(losses)
    for trial in last.trials:
        assert 0.8 * (last.budget or 0) < trial.way.sizes.of(purpose) <= (last.budget or 0)
    used = {row["method"] for row in first.file.tables} - {"full"}
    rest = set(names[1 + len(whole) :])  # without some, nothing may fit
    assert rest
    assert rest <= {f"plan without {method}" for method in used}
    assert less.way.name == names[-1]
    assert names[-1].split()[-1] not in {row["method"] for row in less.file.tables}
    assert last.way is last.trials[len(whole)].way
    methods = {row["method"] for row in last.file.tables}
    assert len(methods - {"full"}) <= 1, "small tables stay full"
    assert last.choice.gap > first.choice.gap
    last.file.write(tmp_path / "plan.toml")
    tables = logical_tables(PreparedDataset.open(job.data.path).schema, job.embedding.dim)
    again = PlanFile.read(tmp_path / "plan.toml").policy(
        tables, last.policy.rules[0].options, where="plan"
    )
    assert again.describe(tables) == last.policy.describe(tables)


def test_rules_and_small_tables_are_kept(job: Job) -> None:
    rules = (RuleConfig(table="field_2", method="hash"), RuleConfig(table="field_1", method="full"))
    embedding = dataclasses.replace(job.embedding, rules=rules, min_rows=20)
    plan = make_plan(
        dataclasses.replace(job, embedding=embedding), Request(budget="0.3x", methods=FEW)
    )
    methods = {name: row["method"] for row in plan.file.tables for name in row["tables"]}
    assert methods["field_2"] == "hash"
    assert methods["field_1"] == methods["field_0"] == "full"
    reasons = {name: row["reason"] for row in plan.file.tables for name in row["tables"]}
    assert "embedding.rules" in reasons["field_1"]
    assert "fewer than 20 rows" in reasons["field_0"]


def test_tables_may_share(job: Job, tmp_path: Path) -> None:
    job = dataclasses.replace(job, embedding=dataclasses.replace(job.embedding, min_rows=0))
    common = prepare(job, Request(budget="0.05x", methods=("unified",)))
    names = sorted(table.name for table in common.tables)
    for items in common.menu.alternatives():
        assert sorted(name for item in items for name in item.tables) == names
    group = common.menu.groups[-1]
    assert sorted(group.tables) == names
    shared = group.dishes[len(group.dishes) // 2].candidate
    path = tmp_path / "plan.toml"
    PlanFile.of(joined([shared]), common.tables, job.embedding.optimizer).write(path)
    embedding = dataclasses.replace(job.embedding, plan=str(path))
    result = train(dataclasses.replace(job, embedding=embedding))
    assert result.bytes["tables"] == shared.sizes.parameters
    assert result.bytes["tables"] + result.bytes["optimizer"] == shared.sizes.training


def test_probes_scale_each_method(job: Job, reference: Path, plan: Plan) -> None:
    after = make_plan(job, request_of(reference, budget="0.2x", grade="probes"))
    assert after.loss != plan.loss
    assert after.trials[0].way.loss != plan.trials[0].way.loss
    assert after.sizes.training <= (after.budget or 0)


def test_trials_from_scratch_are_as_long_as_the_job_or_as_told(job: Job, reference: Path) -> None:
    longer = dataclasses.replace(job, train=dataclasses.replace(job.train, epochs=2))
    given = {"grade": "probes", "methods": ("full", "low_rank")}
    with process_group():
        short, whole = (
            prepare(longer, request_of(reference, budget="1x", trial_epochs=epochs, **given))
            for epochs in (1, None)
        )
        assert short.measure is not None
        assert whole.measure is not None
        policy = alone(Full(), make_rule("full", longer.embedding).options)
        after = [short.measure(policy), whole.measure(policy)]
    embedding = dataclasses.replace(longer.embedding, method="full", min_rows=0)
    result = train(dataclasses.replace(longer, embedding=embedding))
    assert after[0] != after[1]
    assert after[1] == result.valid


def test_a_page_needs_nothing_else(plan: Plan, tmp_path: Path) -> None:
    write_page(plan, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert all(name in page for names in plan.dishes for name in names)
    write_page(plan, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
    found = plain(plan)
    assert found["curve"]
    assert found["bytes"]["training"] == plan.sizes.training


def test_a_page_is_readable_on_a_phone_and_a_desktop(plan: Plan, tmp_path: Path) -> None:
    write_page(plan, tmp_path / "plan.html")
    with browser(tmp_path) as page:
        check_readable(page, tmp_path / "plan.html", charts=1)


def test_a_run_of_a_plan_begins_with_the_reference(
    job: Job, reference: Path, tmp_path: Path
) -> None:
    plan = make_plan(job, request_of(reference, budget="0.8x"))
    run = planned(job, plan, tmp_path / "plan.toml")
    start = start_from(run, reference)
    with process_group():
        built = build(run, PreparedDataset.open(job.data.path).schema, start.policy)
        start.write(built)
        before, _ = load_run(reference)
        name = max(plan.worths, key=lambda table: plan.worths[table])
        new, old = built.embeddings.vectors(name), before.embeddings.vectors(name)
    assert torch.linalg.norm(new - old) < 0.5 * torch.linalg.norm(old)


def test_a_plan_for_scratch_that_begins_with_a_run_keeps_the_runs_dims(
    job: Job, reference: Path, tmp_path: Path
) -> None:
    plan = make_plan(job, Request(budget="0.3x", methods=("full", "dnis")))
    start = start_from(planned(job, plan, tmp_path / "plan.toml"), reference)
    with process_group():
        vectors = load_run(reference)[0].embeddings.vectors

        def energy(policy: Policy) -> float:
            """Sum of the squares of the run's values that a policy keeps."""
            total = 0.0
            for method in [rule.method for rule in policy.rules]:
                for name, blocks in (getattr(method, "kept", None) or {}).items():
                    sizes = [block.ids for block in blocks]
                    for block, rows in zip(blocks, vectors(name).split(sizes), strict=True):
                        total += float(rows[:, list(block.dims)].square().sum())
            return total

        assert energy(start.policy) > 1.05 * energy(plan.policy) > 0
