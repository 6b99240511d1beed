"""The command line starts several processes, and speaks with one voice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recsys_compress.config import dump_job
from recsys_compress.data.dataset import PreparedDataset
from tests.distributed.processes import ROOT
from tests.train.jobs import make_job

pytestmark = pytest.mark.timeout(600)  # several processes on a busy machine

LAUNCHERS = {
    "nproc": ["-m", "recsys_compress", "train", "--nproc", "2"],
    "torchrun": [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "recsys_compress",
        "train",
    ],
}


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "--set", f"tracking.uri=sqlite:///{folder}/mlflow.db"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_one_job(
    launcher: str, synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(dump_job(make_job(synthetic_dataset, tmp_path / "runs", epochs=1)))
    done = command(*LAUNCHERS[launcher], str(job), "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["test"]["auc"] > 0.6
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(folder) == result["folder"]
    assert "row_wise" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_is_said_in_one_line(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = make_job(synthetic_dataset, tmp_path / "runs", epochs=1)
    (tmp_path / "job.toml").write_text(dump_job(job))
    words = [str(tmp_path / "job.toml"), "--set", f"data.path={tmp_path}/none"]
    done = command(*LAUNCHERS["nproc"], *words, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert {line[:7] for line in lines} == {"error: "}, done.stderr
    assert all(f"{tmp_path}/none" in line for line in lines)
