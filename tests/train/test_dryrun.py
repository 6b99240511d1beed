"""A dry run's figures against those of real processes."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from recsys_compress.config import Job, ShardingConfig
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.track.cluster import print_dry_run
from recsys_compress.train.dryrun import dry_run
from tests.distributed import processes
from tests.distributed.figures import job_of
from tests.train.jobs import make_job

CASES = [
    ("full", "table_wise"),
    ("full", "row_wise"),
    ("unified", "auto"),
    ("dynamic_sparse", "row_wise"),
]


@pytest.mark.parametrize("size", [1, 2])
def test_figures_are_those_of_real_processes(
    synthetic_dataset: PreparedDataset, tmp_path: Path, size: int
) -> None:
    cases = CASES if size > 1 else CASES[1:]
    measured = processes.run(
        "tests.distributed.figures",
        size,
        dataset=str(synthetic_dataset.path),
        folder=str(tmp_path),
        cases=cases,
    )
    for name, kind in cases:
        predicted = dry_run(job_of(synthetic_dataset, tmp_path, name, kind), size)
        for rank, found in zip(predicted.ranks, measured, strict=True):
            real = found[f"{name} {kind}"]
            where = f"{name} {kind}, process {rank.rank} of {size}"
            for figure in ("parameters", "optimizer", "gradients", "activations"):
                expected = pytest.approx(real[figure], rel=0.05)
                assert getattr(rank, figure) == expected, f"{where}: {figure}"
            for key, exchange in rank.exchanges.items():
                for way, value in real["exchanges"][key].items():
                    expected = pytest.approx(value, rel=0.05)
                    assert getattr(exchange, way) == expected, f"{where}: {key} {way}"


def on_gpus(dataset: PreparedDataset, folder: Path, memory: str | int) -> Job:
    job = make_job(dataset, folder, "full")
    return dataclasses.replace(
        job,
        train=dataclasses.replace(job.train, device="cuda"),
        sharding=ShardingConfig(device_memory=memory),
    )


def test_many_gpus_that_are_not_here_and_no_row_read(
    synthetic_dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(synthetic_dataset.path, copy)
    for shard in PreparedDataset.open(copy).files("train"):
        shard.write_bytes(bytes(shard.stat().st_size))  # nothing that could be read
    found = dry_run(on_gpus(PreparedDataset.open(copy), tmp_path, "80GiB"), 256)
    assert len(found.ranks) == 256
    # Every row is somewhere, once.
    assert sum(s.rows for s in found.shards) == sum(
        field.num_embeddings for field in synthetic_dataset.schema.categorical
    )
    spread = [sum(r.exchanges["ids"].sent for r in found.ranks)]
    spread.append(sum(r.exchanges["ids"].received for r in found.ranks))
    assert spread[0] == pytest.approx(spread[1], rel=1e-3)  # what is sent arrives
    print_dry_run(found)
    shown = capsys.readouterr().out
    assert f"fullest ({found.fullest.rank})" in shown
    assert "256 processes on cuda, 85.9 GB each" in shown


@pytest.mark.parametrize(
    ("memory", "message"), [(100, "tables and optimizer state take"), (40_000, "process 0 of 4")]
)
def test_what_does_not_fit_is_said_in_bytes(
    synthetic_dataset: PreparedDataset, tmp_path: Path, memory: int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"{message}.*are missing"):
        dry_run(on_gpus(synthetic_dataset, tmp_path, memory), 4)
