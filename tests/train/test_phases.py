"""Methods that train in stages, and trained models that another method takes over."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from recsys_compress.compress.method import method_name
from recsys_compress.compress.policy import resolve
from recsys_compress.compress.size import DATA_TYPE_BITS
from recsys_compress.compress.storage import StoragePlan
from recsys_compress.config import EmbeddingConfig, Job, RuleConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.reader import Reader
from recsys_compress.data.sources.tabular import Tabular
from recsys_compress.errors import UserError
from recsys_compress.ranks import Ranks
from recsys_compress.train import trainer
from recsys_compress.train.build import EMBEDDINGS, Built, build, logical_tables
from recsys_compress.train.checkpoint import _Pending
from recsys_compress.train.events import RunResult
from recsys_compress.train.handover import check_ids
from recsys_compress.train.post import compress, load_run, store
from recsys_compress.train.shard import process_group
from recsys_compress.train.step import Learner
from recsys_compress.train.trainer import train
from tests.serve.clicks import prepared, raw_rows
from tests.train.jobs import Recorder, assert_same_end, make_job

STEPS = 32  # of an epoch
PHASES = {"warm-up": 1, "search": 1, "retrain": 2}  # epochs


def staged_job(dataset: PreparedDataset, folder: Path, optimizer: str) -> Job:
    """Returns a job of `dnis`, whose tables train in three phases."""
    embedding = EmbeddingConfig(
        dim=8,
        method="dnis",
        budget="0.5x",
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=0.1 if optimizer != "adam" else 0.01,
        methods={"dnis": {"warmup_epochs": 1, "search_epochs": 1, "num_blocks": 3}},
    )
    return dataclasses.replace(make_job(dataset, folder), embedding=embedding)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_the_search_asks_for_no_gradient_of_what_is_frozen(
    optimizer: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = staged_job(synthetic_dataset, tmp_path, optimizer)
    tables = logical_tables(synthetic_dataset.schema, job.embedding.dim)
    _, search, _ = resolve(job.embedding, tables).phases()
    with process_group():
        built = build(job, synthetic_dataset.schema, search.policy)
        batches = list(Reader(synthetic_dataset, "valid", batch_size=100).epoch(0))
        before = {name: weight.clone() for name, weight in built.weights().items()}
        Learner(built, search, Ranks(), iter(batches)).step(batches[0], 0.0, 0.1)
        after = built.weights()
        frozen = {name for name in before if not name.startswith(EMBEDDINGS)}
        gradients = dict(built.model.module.named_parameters())
        assert frozen & gradients.keys()
        assert all(gradients[name].grad is None for name in frozen & gradients.keys())
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any(name.endswith("alpha") for name in moved)
    assert any(name.endswith("weight") for name in moved)
    assert not moved & frozen


@pytest.fixture(scope="module")
def full_run(
    synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """A trained model with full tables."""
    return train(make_job(synthetic_dataset, tmp_path_factory.mktemp("full"), "full"))


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_phases_follow_each_other_and_end_in_the_budget(
    optimizer: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    recorder = Recorder()
    result = train(staged_job(synthetic_dataset, tmp_path, optimizer), listeners=[recorder])
    assert [entry["phase"] for entry in result.history] == [0, 1, 2, 2]
    assert result.steps == STEPS * sum(PHASES.values())
    assert result.best_step > STEPS * 2  # only the last phase's weights are the result
    assert result.test["auc"] > 0.8
    # The bytes are known before the search, and are those of what is left after it.
    assert recorder.start is not None
    assert 0.95 * 0.5 <= recorder.start.bytes["tables"] / result.bytes["full"] <= 0.5
    weights = load_file(result.folder / "model.safetensors")
    tables = sum(t.nbytes for n, t in weights.items() if n.startswith("embeddings."))
    assert tables == result.bytes["tables"]
    assert 0.95 * 0.5 <= result.bytes["ratio"] ** -1 <= 0.5
    size = json.loads((result.folder / "size.json").read_text())
    assert size["total"]["tables"] == tables
    with process_group():
        built, _ = load_run(result.folder)  # the policy that was found is in the folder
    assert built.embeddings.size_report().table_bytes == tables


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("stop_at", [20, STEPS, 50, 2 * STEPS, 80])
def test_a_run_interrupted_in_any_phase_resumes_to_the_same_weights(
    optimizer: str,
    stop_at: int,
    synthetic_dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recsys_compress.train.trainer.LOG_SECONDS", 0.0)
    job = staged_job(synthetic_dataset, tmp_path, optimizer)
    whole = train(job)
    stopped = train(job, listeners=[Recorder(stop_at=stop_at)])
    assert stopped.interrupted
    resumed = train(None, resume=stopped.folder)
    assert_same_end(resumed, whole)


def test_a_phase_is_there_to_go_on_with_before_its_weights_replace_the_last_ones(
    synthetic_dataset: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = staged_job(synthetic_dataset, tmp_path, "adam")
    job = dataclasses.replace(
        job, train=dataclasses.replace(job.train, background_checkpoints=True)
    )
    real_write, real_keep, phases = _Pending.write, trainer.keep_best, []

    def slowly(self: _Pending) -> None:
        time.sleep(1.0)
        real_write(self)

    def kept(built: Built, folder: Path, ranks: Ranks, step: int) -> None:
        names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        phases.append(names[-1][-1] if names else "0")
        real_keep(built, folder, ranks, step)

    monkeypatch.setattr(_Pending, "write", slowly)
    monkeypatch.setattr(trainer, "keep_best", kept)
    train(job)
    assert phases[:3] == ["0", "1", "2"]


@pytest.mark.parametrize("budget", ["0.9x", "0.8x"])
def test_tables_of_other_rules_keep_their_bytes_in_a_smaller_model(
    budget: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path / "before", "full", epochs=1)
    rules = (RuleConfig(table="field_3", method="hash"),)
    embedding = dataclasses.replace(
        job.embedding, rules=rules, methods={"hash": {"share": 0.1}}, dim=8
    )
    run = train(dataclasses.replace(job, embedding=embedding))
    small, start = compress(
        run.folder, "low_rank", budget, ["train.epochs=0", f"train.output={tmp_path}"]
    )
    result = train(small, start=start)
    assert result.bytes["model"] <= float(budget.rstrip("x")) * run.bytes["model"]
    assert result.test["auc"] > 0.6


@pytest.mark.parametrize("method", ["dnis", "dynamic_sparse", "low_rank", "group_reduce", "full"])
def test_a_trained_model_is_taken_over_whole_at_a_budget_of_all_bytes(
    method: str, full_run: RunResult, tmp_path: Path
) -> None:
    sets = ["train.epochs=0", f"train.output={tmp_path}"]
    job, start = compress(full_run.folder, method, "1.5x", sets)
    result = train(job, start=start)
    assert result.steps == 0
    assert result.test["auc"] == pytest.approx(full_run.test["auc"], abs=1e-6)
    assert result.test["logloss"] == pytest.approx(full_run.test["logloss"], abs=1e-6)


@pytest.mark.parametrize("method", ["dnis", "dynamic_sparse"])
def test_a_trained_models_tables_shrink_to_the_budget(
    method: str, full_run: RunResult, tmp_path: Path
) -> None:
    sets = ["train.epochs=1", f"train.output={tmp_path}"]
    job, start = compress(full_run.folder, method, "0.5x", sets)
    result = train(job, start=start)
    assert 0.95 * 0.5 <= result.bytes["tables"] / result.bytes["full"] <= 0.5
    assert result.valid["auc"] >= result.history[0]["auc"]  # the first is before fine-tuning
    assert result.history[0]["auc"] > 0.6


def test_low_rank_shrinks_the_whole_model(full_run: RunResult, tmp_path: Path) -> None:
    sets = ["train.epochs=1", f"train.output={tmp_path}"]
    job, start = compress(full_run.folder, "low_rank", "0.7x", sets)
    result = train(job, start=start)
    assert result.bytes["model"] <= 0.7 * full_run.bytes["model"]
    assert result.bytes["model"] >= 0.9 * 0.7 * full_run.bytes["model"]
    assert result.valid["auc"] > full_run.valid["auc"] - 0.02
    resumed = train(None, resume=result.folder)  # nothing is left to do
    assert resumed.test == result.test
    assert resumed.bytes == result.bytes


def test_a_compressed_model_can_be_compressed_again(full_run: RunResult, tmp_path: Path) -> None:
    sets = ["train.epochs=0", f"train.output={tmp_path}"]
    job, start = compress(full_run.folder, "dnis", "0.8x", sets)
    once = train(job, start=start)
    job, start = compress(once.folder, "dynamic_sparse", "0.5x", sets)
    twice = train(job, start=start)
    assert twice.bytes["tables"] < once.bytes["tables"]


@pytest.mark.parametrize("data_type", DATA_TYPE_BITS)
def test_a_run_is_stored_in_another_type(data_type: str, full_run: RunResult) -> None:
    found = store(full_run.folder, StoragePlan(types=data_type))  # type: ignore[arg-type]
    least = {"int2": 0.1, "int4": 0.01}.get(data_type, 0.001)
    assert found.test["auc"] == pytest.approx(full_run.test["auc"], abs=least)
    assert found.before == full_run.test
    files = list(full_run.folder.glob("tables-*.safetensors"))
    stored = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    assert found.bytes["tables"] in stored


@pytest.mark.parametrize(
    ("method", "budget", "message"),
    [
        ("mixed_dim", None, "'mixed_dim' cannot take over trained tables"),
        ("dynamic_sparse", "0.001x", "out of reach"),
        ("nonsense", "0.5x", "is unknown"),
    ],
)
def test_what_cannot_be_taken_over_is_one_clear_error(
    method: str, budget: str | None, message: str, full_run: RunResult
) -> None:
    with pytest.raises(UserError, match=message):
        compress(full_run.folder, method, budget)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("embedding.dim=4", "has embedding_dim = 8 there and 4 in the job"),
        ("model.dcnv2.hidden=[7]", r"weights deep\.\d\.\w+: the trained model has"),
        ("model.name=deepfm", "leave the settings of .model. as they were"),
        # Two probes of 2 dims give vectors of width 4, for a model that was trained with 8.
        ("embedding.methods.unified={num_probes=2, probe_dim=2}", r"weights cross\.0\.bias"),
    ],
)
def test_a_trained_model_goes_on_as_the_model_that_it_is(
    setting: str, message: str, full_run: RunResult, tmp_path: Path
) -> None:
    def fine_tune() -> None:
        sets = [f"train.output={tmp_path}", setting]
        job, start = compress(full_run.folder, "unified", "0.5x", sets)
        train(job, start=start)

    with pytest.raises(UserError, match=message):
        fine_tune()


def test_vectors_of_another_width_than_their_tables_are_not_taken_over(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path, "unified", epochs=1)
    narrow = {"unified": {"num_probes": 2, "probe_dim": 2}}
    embedding = dataclasses.replace(job.embedding, budget="0.2x", methods=narrow)
    run = train(dataclasses.replace(job, embedding=embedding))
    with pytest.raises(UserError, match="has trained vectors of width 4, and "):
        compress(run.folder, "hash", "0.1x")


def test_a_run_by_a_plan_is_compressed_by_what_is_asked(
    full_run: RunResult, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(full_run.folder, tmp_path / "run"))
    text = (folder / "job.toml").read_text(encoding="utf-8")
    planned = text.replace("[embedding]\n", '[embedding]\nplan = "plan.toml"\n')
    (folder / "job.toml").write_text(planned, encoding="utf-8")
    job, start = compress(folder, "hash", "0.5x")
    assert (job.embedding.plan, method_name(start.policy.default.method)) == (None, "hash")


def test_a_damaged_run_is_refused(full_run: RunResult, tmp_path: Path) -> None:
    for name in ("job.toml", "lowering.json"):
        (tmp_path / name).write_bytes((full_run.folder / name).read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
        compress(tmp_path, "low_rank", "0.5x")
    (tmp_path / "lowering.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"lowering\.json: cannot be read"):
        compress(tmp_path, "low_rank", "0.5x")


def test_training_from_scratch_needs_an_epoch(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.epochs = 0"):
        train(make_job(synthetic_dataset, tmp_path, epochs=0))


def test_a_model_of_ranks_is_made_smaller_still(full_run: RunResult, tmp_path: Path) -> None:
    folder, sizes = full_run.folder, [full_run.bytes["model"]]
    for budget in ("0.9x", "0.8x"):
        sets = ["train.epochs=0", f"train.output={tmp_path / budget}"]
        job, start = compress(folder, "low_rank", budget, sets)
        result = train(job, start=start)
        folder = result.folder
        sizes.append(result.bytes["model"])
        assert sizes[-1] <= float(budget.rstrip("x")) * sizes[-2]


def test_the_same_number_of_other_values_is_told_from_the_own(tmp_path: Path) -> None:
    one = prepared(tmp_path / "one")
    rows = raw_rows()
    rows = rows.set_column(1, "item", pc.binary_replace_slice(rows["item"], 0, 1, "I"))
    pq.write_table(rows, tmp_path / "one" / "clicks.parquet")
    schema = str(tmp_path / "one" / "schema.toml")
    other = prepare(
        Tabular(path=str(tmp_path / "one" / "clicks.parquet"), schema_file=schema),
        tmp_path / "other",
    )
    check_ids(one, one, tmp_path)
    with pytest.raises(UserError, match="ids of field 'item' stand for other values"):
        check_ids(other, one, tmp_path)
