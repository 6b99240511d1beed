"""Runs that several processes began and others go on with; runs that are killed; broken disks."""

import ctypes
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys_compress.config import dump_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.train.checkpoint import load_newest
from tests.distributed.processes import finish, run, start
from tests.distributed.soak import Soak
from tests.train.jobs import make_job

pytestmark = pytest.mark.timeout(600)  # several processes on a busy machine

TASKS = "tests.distributed.tasks"
STOP_AT = 11
METHODS = {
    "full": ["embedding.optimizer=adagrad"],
    "unified": ["embedding.method=unified", "embedding.budget=0.3x", "embedding.optimizer=adam"],
    "dynamic_sparse": [
        "embedding.method=dynamic_sparse",
        "embedding.budget=0.5x",
        "embedding.methods.dynamic_sparse={update_steps=7, window=5}",
    ],
}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def job_file(synthetic_dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of 16 steps an epoch, whose run folders are beside it."""
    folder = tmp_path_factory.mktemp("job")
    job = make_job(synthetic_dataset, folder / "runs", "full", batch_size=1000, checkpoint_steps=5)
    (folder / "job.toml").write_text(dump_job(job), encoding="utf-8")
    return folder / "job.toml"


@pytest.fixture(scope="module")
def begun(job_file: Path) -> dict[str, Found]:
    """By method, a run of two processes that has ended, and one that was stopped."""
    common = {"do": "train", "job": str(job_file)}
    tasks = [
        {**common, "settings": [*settings, "model.dcnv2.dropout=0.0"], **stop}
        for settings in METHODS.values()
        for stop in ({}, {"stop_at": STOP_AT - 1})
    ]
    results = run(TASKS, 2, tasks=tasks)[0]
    return {
        method: {"whole": whole, "stopped": stopped}
        for method, whole, stopped in zip(METHODS, results[::2], results[1::2], strict=True)
    }


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_processes_reads_what_was_written(
    size: int, begun: dict[str, Found], tmp_path: Path
) -> None:
    folders = [Path(found["stopped"]["folder"]) for found in begun.values()]
    tasks = [
        {"do": "rewrite", "run": str(folder), "out": str(tmp_path / folder.name)}
        for folder in folders
    ]
    for steps in run(TASKS, size, tasks=tasks):
        assert steps == [STOP_AT] * len(METHODS)
    for folder in folders:
        written = load_newest(folder / "checkpoints").read()
        again = load_newest(tmp_path / folder.name / "checkpoints").read()
        assert set(again) == set(written)
        for name in written.keys() - {"rng"}:
            assert torch.equal(again[name], written[name]), name


def test_a_run_goes_on_in_another_number_of_processes(
    job_file: Path, begun: dict[str, Found], tmp_path: Path
) -> None:
    """From two to one, to three and back: the same rows in the same order, so the same end."""
    resume = {"do": "train", "job": str(job_file), "settings": []}
    folders = {m: shutil.copytree(f["stopped"]["folder"], tmp_path / m) for m, f in begun.items()}
    runs = [{**resume, "resume": str(f)} for f in folders.values()]
    # The job that a run keeps says how it trains.
    for one in runs:
        one["job"] = f"{one['resume']}/job.toml"
    for size, stop_at in ((1, 15), (3, 20)):
        run(TASKS, size, tasks=[{**one, "stop_at": stop_at} for one in runs])
        for folder in folders.values():
            assert load_newest(folder / "checkpoints").state["step"] == stop_at + 1
    ended = run(TASKS, 2, tasks=runs)[0]
    for found, (method, wanted) in zip(ended, begun.items(), strict=True):
        whole = wanted["whole"]
        assert found["steps"] == whole["steps"], method
        for split in ("valid", "test"):
            assert found[split] == pytest.approx(whole[split], abs=1e-3), method


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights(
    size: int, job_file: Path, tmp_path: Path
) -> None:
    Soak(job_file, tmp_path, size=size, seed=size, background=size == 2).kill(3 - size)


def command_line(resume: Path) -> list[str]:
    return ["-m", "recsys_compress", "train", "--resume", str(resume)]


@pytest.fixture
def interrupted(begun: dict[str, Found], tmp_path: Path) -> Path:
    """The folder of a run of two processes that stopped with two checkpoints."""
    return Path(shutil.copytree(begun["full"]["stopped"]["folder"], tmp_path / "run"))


def test_a_damaged_part_is_passed_over_and_without_any_whole_one_all_say_so(
    interrupted: Path,
) -> None:
    older, newer = sorted((interrupted / "checkpoints").glob("step-*"))
    second = newer / "shard-00002-model-00001-of-00001.safetensors"
    data = bytearray(second.read_bytes())
    data[-8] ^= 1
    second.write_bytes(data)
    assert load_newest(interrupted / "checkpoints").path == older
    (older / "state.json").unlink()
    for done in finish(start(command_line(interrupted), 2), 60):
        assert (done.status, "Traceback" in done.err) == (2, False), done.err
        assert "holds no whole checkpoint; start the run anew" in done.err


def fill_disk() -> None:
    """Lets no file of this process grow beyond 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def obey_permissions() -> None:
    """Takes from root what lets it write in folders that cannot be written."""
    drop_capability, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_capability, dac_override, 0, 0, 0)


@pytest.mark.parametrize("spoiled", ["disk full", "read only"])
def test_a_checkpoint_that_cannot_be_written_is_one_line_in_all_processes(
    spoiled: str, interrupted: Path
) -> None:
    checkpoints = interrupted / "checkpoints"
    before = load_newest(checkpoints)
    tensors = before.read()
    prepare = {1: fill_disk}
    if spoiled == "read only":
        checkpoints.chmod(0o555)
        prepare = {0: obey_permissions}
    try:
        done = finish(start(command_line(interrupted), 2, prepare), 60)
    finally:
        checkpoints.chmod(0o755)
    for one in done:
        assert (one.status, "Traceback" in one.err) == (2, False), one.err
        assert re.search(r"error: .*step-\d+-0: .*cannot be written", one.err)
    after = load_newest(checkpoints)
    assert after.path == before.path
    assert all(torch.equal(value, tensors[name]) for name, value in after.read().items())
