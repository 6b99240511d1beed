"""The trainer on real data of small size: learning, bytes, optimizers, checkpoints, resuming."""

import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recsys_compress.compress import method_classes
from recsys_compress.config import load_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError
from recsys_compress.train.build import build
from recsys_compress.train.checkpoint import load_newest
from recsys_compress.train.events import RunResult
from recsys_compress.train.folder import MODEL, read_result
from recsys_compress.train.shard import full_tensors, process_group
from recsys_compress.train.trainer import Trainer, train
from tests.train.jobs import EMBEDDINGS, Recorder, assert_same_end, make_job

GAP = 0.08  # to the AUC of the true odds, after two passes over 16,000 rows


def test_every_method_has_a_job() -> None:
    assert {embedding.method for embedding in EMBEDDINGS.values()} == set(method_classes())


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_run_learns_and_reports(
    embedding: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    recorder = Recorder()
    result = train(make_job(synthetic_dataset, tmp_path, embedding), listeners=[recorder])
    best = synthetic_dataset.manifest.best
    assert best is not None
    assert best.auc - GAP < result.test["auc"] < best.auc
    assert 0 < result.test["ne"] < 1
    assert result.test["calibration"] == pytest.approx(1, abs=0.2)
    assert recorder.result == result
    assert recorder.start is not None
    assert recorder.start.run_id == result.run_id
    assert set(recorder.values) >= {"train/loss", "perf/samples_per_s", "eval/auc", "eval/ne"}
    assert len(result.history) == 2
    assert result.samples_per_s > 0
    saved = json.loads((result.folder / "result.json").read_text())
    assert saved["test"] == result.test
    files = {path.name for path in result.folder.iterdir()}
    assert files >= {"job.toml", "size.json", "lowering.json", "model.safetensors", "checkpoints"}
    weights = load_file(result.folder / "model.safetensors")
    tables = sum(t.nbytes for n, t in weights.items() if n.startswith("embeddings."))
    assert tables == result.bytes["tables"]
    assert sum(t.nbytes for t in weights.values()) == result.bytes["model"]


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_reported_optimizer_bytes_are_the_states(
    embedding: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path, embedding, epochs=1)
    with process_group():
        built = build(job, synthetic_dataset.schema)
        tables = {id(built.embeddings.get_parameter(n)) for n in built.embeddings.table_options()}
        names = [n for n, p in built.model.named_parameters() if id(p) not in tables]
        dense = [n for n in names if n not in built.model.fused_optimizer.params]
    result = train(job)
    tensors = load_newest(result.folder / "checkpoints").read()
    state = [t for n, t in tensors.items() if n.startswith("optim/fused/")]
    # Dense tables are the second dense optimizer's, and nothing else is.
    state += [t for n, t in tensors.items() if n.startswith("optim/dense/1/")]
    # What combines look-ups is trained by the first, with the rest of the dense part.
    for index in (i for i, name in enumerate(dense) if name.startswith("embeddings.output.")):
        state += [t for n, t in tensors.items() if n.startswith(f"optim/dense/0/{index}/")]
    assert sum(t.nbytes for t in state) == result.bytes["optimizer"]


@pytest.mark.parametrize(
    "embedding", ["full", "unified-adam", "mixed_dim", "low_rank-adam", "group_reduce"]
)
def test_every_parameter_moves_and_is_in_one_optimizer(
    embedding: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path, embedding)
    with process_group():
        before = {
            name: tensor.clone()
            for name, tensor in full_tensors(
                build(job, synthetic_dataset.schema).model.state_dict()
            ).items()
        }
    result = train(dataclasses.replace(job, train=dataclasses.replace(job.train, epochs=1)))
    after = load_file(result.folder / "model.safetensors")
    assert set(before) == set(after)
    unmoved = [n for n in after if torch.equal(before[n], after[n]) and after[n].numel() > 1]
    assert unmoved == []


def test_same_seed_same_weights_and_another_seed_others(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    runs = [train(make_job(synthetic_dataset, tmp_path, epochs=1, seed=seed)) for seed in (0, 0, 1)]
    first, same, other = (load_file(run.folder / "model.safetensors") for run in runs)
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


RESUMED = (
    "unified",
    "unified-adam",
    "adagrad",
    "low_rank-adam",
    "group_reduce",
    "dynamic_sparse-adam",
)


@pytest.mark.parametrize("embedding", RESUMED)
@pytest.mark.parametrize("stop_at", [1, 45])
def test_an_interrupted_run_resumes_to_the_same_weights(
    embedding: str,
    stop_at: int,
    synthetic_dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recsys_compress.train.trainer.LOG_SECONDS", 0.0)
    job = make_job(synthetic_dataset, tmp_path, embedding, epochs=3, schedule="cosine")
    whole = train(job)
    stopped = train(job, listeners=[Recorder(stop_at=stop_at)])
    assert stopped.interrupted
    assert stopped.test == {}
    assert stopped.steps < whole.steps
    resumed = train(None, resume=stopped.folder)
    assert not resumed.interrupted
    assert resumed.run_id == stopped.run_id
    assert_same_end(resumed, whole)


@pytest.mark.parametrize(("log_seconds", "background"), [(0.0, False), (1e9, False), (1e9, True)])
def test_checkpoints_between_evaluations(
    log_seconds: float,
    background: bool,
    synthetic_dataset: PreparedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recsys_compress.train.trainer.LOG_SECONDS", log_seconds)
    job = make_job(
        synthetic_dataset,
        tmp_path,
        epochs=1,
        checkpoint_steps=10,
        background_checkpoints=background,
    )
    result = train(job)
    kept = [path.name for path in sorted((result.folder / "checkpoints").iterdir())]
    assert kept == ["step-000000030-0", f"step-{result.steps:09d}-0"]


def test_a_damaged_checkpoint_is_passed_over(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    result = train(make_job(synthetic_dataset, tmp_path, epochs=2))
    folder = result.folder / "checkpoints"
    older, newer = sorted(folder.glob("step-*"))
    (tensors,) = newer.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    assert load_newest(folder).state["step"] == int(older.name.split("-")[1])
    assert not newer.exists(), "it would stand in the way of a whole one"
    (older / "state.json").unlink()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        load_newest(folder)


@pytest.fixture(scope="module")
def stopped(synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs that was stopped in the first."""
    job = make_job(synthetic_dataset, tmp_path_factory.mktemp("stopped"))
    return train(job, listeners=[Recorder(stop_at=5)]).folder


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("embedding.method=full", "embedding.method = 'full': the run .* has 'unified'"),
        ("embedding.learning_rate=0.5", "embedding.learning_rate = 0.5: the run "),
        ("model.name=deepfm", "model.name = 'deepfm': the run "),
        ("train.batch_size=100", "train.batch_size = 100: the run .* has 500"),
        ("data.streams=3", "data.streams = 3: the run .* has None"),
        ("train.optimizer=adagrad", "train.optimizer = 'adagrad': the run .* has 'adam'"),
    ],
)
def test_a_run_goes_on_as_it_began(setting: str, message: str, stopped: Path) -> None:
    before = (stopped / "job.toml").read_bytes()
    with pytest.raises(UserError, match=message):
        train(load_job(stopped / "job.toml", [setting]), resume=stopped)
    assert (stopped / "job.toml").read_bytes() == before


def test_the_time_of_a_run_is_that_of_all_its_processes(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    before = read_result(folder)
    after = train(None, resume=folder)
    assert before["cpu_seconds"] > 0
    assert after.seconds > before["seconds"]
    assert after.cpu_seconds > before["cpu_seconds"]


def test_a_run_does_not_go_on_with_other_data(stopped: Path, tmp_path: Path) -> None:
    source = Synthetic(rows=20_000, cardinalities=(5, 50, 300, 2000), dense=2)
    prepare(source, tmp_path / "data", seed=1)
    job = load_job(stopped / "job.toml", [f"data.path={tmp_path / 'data'}"])
    with pytest.raises(UserError, match=r"is other data than the run .* began with"):
        train(job, resume=stopped)


def test_a_run_may_be_made_longer(stopped: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    longer = train(load_job(folder / "job.toml", ["train.epochs=3"]), resume=folder)
    assert longer.steps == 3 * 32
    assert load_job(folder / "job.toml").train.epochs == 3


def test_a_phase_that_begins_within_an_epoch_ends_within_one(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path, epochs=1)
    with process_group() as ranks:
        trainer = Trainer(job, ranks, [], None)
        trainer.progress.step = trainer.progress.phase_step = 8
        trainer.reader.load_state_dict({"epoch": 0, "batch": 8})
        trainer.fit(threading.Event())
    assert trainer.progress.step == 8 + 32
    assert [entry["step"] for entry in trainer.progress.history] == [32, 40]
    assert load_newest(trainer.folder / "checkpoints").state["step"] == 40


def test_batch_norm_takes_a_last_batch_of_one_row(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    rows = synthetic_dataset.rows("train")
    job = make_job(synthetic_dataset, tmp_path, epochs=1, batch_size=rows - 1)
    deep = dataclasses.replace(job.model.dcnv2, batch_norm=True)
    result = train(dataclasses.replace(job, model=dataclasses.replace(job.model, dcnv2=deep)))
    assert result.steps == 2
    assert all(weight.isfinite().all() for weight in load_file(result.folder / MODEL).values())


def test_the_best_weights_on_validation_are_kept(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path, "full", epochs=8, learning_rate=0.05, patience=2)
    result = train(job)
    aucs = [entry["auc"] for entry in result.history]
    best = max(range(len(aucs)), key=aucs.__getitem__)
    assert result.best_step == result.history[best]["step"]
    assert result.valid["auc"] == max(aucs)
    assert len(aucs) in (8, best + 1 + 2)


@pytest.mark.parametrize("embedding", ["full", "low_rank-adam"])
def test_layers_learn_in_bf16(
    embedding: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    exact, rounded = (
        train(make_job(synthetic_dataset, tmp_path, embedding, precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert rounded.test["auc"] != exact.test["auc"]
    assert rounded.test["auc"] == pytest.approx(exact.test["auc"], abs=0.01)
    weights = load_file(rounded.folder / "model.safetensors")
    floating = {t.dtype for t in weights.values() if t.is_floating_point()}
    assert floating == {torch.float32}


def test_more_evaluations_than_epochs(synthetic_dataset: PreparedDataset, tmp_path: Path) -> None:
    result = train(make_job(synthetic_dataset, tmp_path, evals_per_epoch=3, patience=99))
    assert [round(entry["epoch"], 1) for entry in result.history] == [0.3, 0.7, 1, 1.3, 1.7, 2]


def test_divergence_is_one_clear_error(synthetic_dataset: PreparedDataset, tmp_path: Path) -> None:
    recorder = Recorder()
    job = make_job(synthetic_dataset, tmp_path, optimizer="sgd", learning_rate=1e30)
    with pytest.raises(UserError, match="training diverged"):
        train(job, listeners=[recorder])
    assert isinstance(recorder.error, UserError)


def test_what_diverges_in_its_last_step_is_no_result(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(
        synthetic_dataset, tmp_path, epochs=1, batch_size=1 << 20, optimizer="sgd",
        learning_rate=1e38,
    )  # fmt: skip
    with pytest.raises(UserError, match="diverged: validation logloss nan before step 1;"):
        train(job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "no CUDA device"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "only optimizer 'adam' decays"),
    ],
)
def test_settings_that_cannot_hold_are_one_clear_error(
    settings: dict[str, object],
    message: str,
    synthetic_dataset: PreparedDataset,
    tmp_path: Path,
) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError, match=message):
        train(make_job(synthetic_dataset, tmp_path, **settings))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(make_job(synthetic_dataset, tmp_path / "file"))


def test_training_works_outside_the_main_thread(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    results: list[RunResult] = []
    job = make_job(synthetic_dataset, tmp_path, epochs=1)
    thread = threading.Thread(target=lambda: results.append(train(job)))
    thread.start()
    thread.join(timeout=60)
    assert results[0].steps > 0
    assert time.time() - os.stat(results[0].folder).st_mtime < 60


def test_numbers_too_small_for_the_processor_are_zero(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    torch.set_flush_denormal(False)
    tiny = torch.full((4,), 1e-39)
    assert (tiny * 0.5).count_nonzero() == 4
    train(make_job(synthetic_dataset, tmp_path, epochs=1, threads=1))
    assert (tiny * 0.5).count_nonzero() == 0
