"""The recipes, run as cron would: again and again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import deploy
from tests.serve.clicks import SCHEMA, held_out, raw_rows

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

JOB = """
[data]
path = "replaced"
[model.dcnv2]
cross_layers = 1
hidden = [16]
[embedding]
dim = 8
min_rows = 20
learning_rate = 0.1
[train]
epochs = 1
batch_size = 500
threads = 1
output = "{folder}/runs"
[tracking]
uri = "sqlite:///{folder}/mlflow.db"
experiment = "clicks"
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Raw rows and a job, as a user would give them to the recipe."""
    (tmp_path / "schema.toml").write_text(SCHEMA)
    (tmp_path / "job.toml").write_text(JOB.format(folder=tmp_path))
    (tmp_path / "gate.toml").write_text("min_rows = 1000\nmax_latency_ms = 1000.0\n")
    pq.write_table(raw_rows(), tmp_path / "clicks.parquet")
    pq.write_table(held_out(), tmp_path / "rows.parquet")
    given = {
        "source": "parquet",
        "from": tmp_path / "clicks.parquet",
        "schema": tmp_path / "schema.toml",
        "data": tmp_path / "data",
        "job": tmp_path / "job.toml",
        "budget": "0.5x",
        "policy": tmp_path / "gate.toml",
        "rows": tmp_path / "rows.parquet",
        "scores": tmp_path / "scores.parquet",
    }
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.mark.timeout(300)
def test_from_raw_rows_to_scores_and_nothing_twice(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deploy", *arguments])
    assert deploy.main() == 0
    assert "champion" in capsys.readouterr().out
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert len(scores) == len(held_out())
    runs = sorted(tmp_path.glob("runs/*/dcnv2-*"))
    assert len(runs) == 2  # the reference, and the plan's
    times = [(run / "result.json").stat().st_mtime_ns for run in runs]
    assert deploy.main() == 0
    assert sorted(tmp_path.glob("runs/*/dcnv2-*")) == runs
    assert [(run / "result.json").stat().st_mtime_ns for run in runs] == times
    assert pq.read_table(tmp_path / "scores.parquet").equals(scores)


@pytest.mark.timeout(300)
def test_an_interrupted_recipe_goes_on_with_the_same_command(
    arguments: list[str], tmp_path: Path
) -> None:
    names = ("--source", "--from", "--schema", "--data", "--job")
    given = [argument for argument in arguments if argument.partition("=")[0] in names]
    command = [sys.executable, "-m", "pipelines.train", *given]
    longer = ["--set=train.epochs=200", "--set=train.patience=200"]
    with subprocess.Popen(
        [*command, *longer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not list(tmp_path.glob("runs/*/dcnv2-*/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "interrupted; run the same command to go on"
