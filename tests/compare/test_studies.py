"""Studies that are really run: in processes of their own, recorded in MLflow, gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from recsys_compress import cli
from recsys_compress.compare.cells import Run, cells, run_of
from recsys_compress.compare.runner import Memory, Runner, StoppedError
from recsys_compress.compare.study import load_study
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.schema import Encoding
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError
from recsys_compress.files import alone
from recsys_compress.train.folder import JOB as JOB_FILE
from recsys_compress.train.folder import MODEL, RESULT

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),
    pytest.mark.timeout(300),  # a dozen processes, each of which imports torch
]

JOB = """
[data]
path = "{data}"
[model.dcnv2]
cross_layers = 1
hidden = [8]
[embedding]
dim = 8
optimizer = "adam"
learning_rate = 0.02
[train]
epochs = {epochs}
batch_size = 1000
evals_per_epoch = 1
[tracking]
uri = "{uri}"
experiment = "studies"
"""
STUDY = """
title = "generated"
job = "job.toml"
seeds = [0]
budgets = ["0.5x"]
storage = ["int8"]

[[methods]]
name = "full"
budgets = []

[[methods]]
name = "hash"
tries = [{ embedding.learning_rate = 0.02 }, { embedding.learning_rate = 0.001 }]

[[methods]]
name = "unified"
budgets = ["0.0001x"]

[[methods]]
name = "pruned"
method = "dynamic_sparse"
after = "full"

[[methods]]
name = "planned"
method = "plan"
after = "full"

[[claims]]
text = "half is as good as all"
left = "hash 0.5x"
right = "full"
least = -0.9
"""


def written(folder: Path, dataset: PreparedDataset, *, epochs: int = 1, study: str = STUDY) -> Path:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    job = JOB.format(data=dataset.path, epochs=epochs, uri=uri)
    (folder / "job.toml").write_text(job, encoding="utf-8")
    path = folder / "study.toml"
    path.write_text(study, encoding="utf-8")
    return path


def arguments(study: Path, *more: str) -> list[str]:
    return ["compare", str(study), "--work", str(study.parent / "work"), *more]


def test_a_study_is_run_recorded_and_not_run_again(
    synthetic_dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, synthetic_dataset)
    assert cli.run(arguments(study, "--processes", "2", "--json")) == 0
    said = capsys.readouterr()
    assert "[7/7] p" in said.err
    assert "planned 0.5x, seed 0: test AUC" in said.err
    found = json.loads(said.out)
    assert [row["cell"] for row in found["rows"]] == [
        "full",
        "hash 0.5x",
        "pruned 0.5x",
        "planned 0.5x",
    ]
    assert found["missing"] == 0
    assert "out of reach" in found["beyond"]["unified 0.0001x"]
    assert found["claims"][0]["holds"] is True
    assert all(row["costs"]["int8"] < 0.01 for row in found["rows"])
    records = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    # The trial that was picked is the cell's run; the other one and what failed are kept too.
    assert len(records) == 6
    for word in ("method=dynamic_sparse", "method=plan"):
        (own,) = [record for record in records if word in record["run"]]
        assert own["figures"]["inference.ratio"] > 0
        assert sum(taken for _, taken in own["tables"]) == own["figures"]["bytes.tables"]
    # The command of a cell is all it takes to run it alone.
    (command,) = next(r["commands"] for r in found["rows"] if r["cell"] == "hash 0.5x")
    alone = [*command.split()[1:], "--set", f"train.output={tmp_path / 'alone'}", "--json"]
    assert cli.run(alone) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test"]["auc"] == pytest.approx(found["rows"][1]["auc"], abs=2e-6)

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("studies")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags.get("kind") == "study")
    nested = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(nested) == 5
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "report.md", "results.json"} <= artifacts

    before = len(runs)
    assert cli.run(arguments(study)) == 0
    assert "/" not in capsys.readouterr().err.replace(str(tmp_path), "")  # no run was counted
    assert len(client.search_runs([experiment.experiment_id])) == before
    assert cli.run(arguments(study, "--list")) == 0
    assert capsys.readouterr().out.strip() == ""


def test_a_study_that_is_stopped_goes_on_to_the_same_figures(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    only_full = STUDY[: STUDY.index("[[methods]]", STUDY.index('name = "full"'))]
    only_full = only_full.replace('["int8"]', "[]")
    figures = []
    for name in ("stopped", "undisturbed"):
        folder = tmp_path / name
        folder.mkdir()
        study = written(folder, synthetic_dataset, epochs=3, study=only_full)
        command = [sys.executable, "-m", "recsys_compress", *arguments(study)]
        if name == "stopped":
            child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 60
            while not list(folder.glob("work/runs/*/*/checkpoints/*")):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=60)
            assert child.returncode == 130
            assert not (folder / "study" / "results.json").exists()
        begun = list(folder.glob("work/runs/*/*/job.toml"))
        subprocess.run(command, check=True, capture_output=True)
        (record,) = json.loads((folder / "study" / "results.json").read_text(encoding="utf-8"))
        figures.append(record["figures"]["test.auc"])
        (run,) = folder.glob("work/runs/*/*/job.toml")
        assert begun == [run] * (name == "stopped")  # and no other in its place
    assert figures[0] == figures[1]


def test_figures_of_other_data_are_not_mixed_with_those_of_this(
    synthetic_dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = STUDY[: STUDY.index("[[methods]]", STUDY.index('name = "full"'))]
    head = head.replace('["int8"]', "[]")
    study = written(tmp_path, synthetic_dataset, study=head)
    assert cli.run(arguments(study)) == 0
    source = Synthetic(rows=3000, cardinalities=(50, 300), dense=1)
    more = head + '[[methods]]\nname = "hash"\n'
    written(tmp_path, prepare(source, tmp_path / "other"), study=more)
    assert cli.run(arguments(study)) == 2
    assert "figures of seed 0 are of other data; move it away" in capsys.readouterr().err
    assert cli.run(arguments(study, "--redo")) == 0
    records = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    assert len({record["dataset"] for record in records}) == 1


def test_two_do_not_run_one_study_at_once(
    synthetic_dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, synthetic_dataset)
    with alone(tmp_path / "work"):
        assert cli.run(arguments(study)) == 2
    assert "work: another process is writing there" in capsys.readouterr().err


def test_runs_wait_until_they_fit_together() -> None:
    memory = Memory(100)
    begun = threading.Event()

    def other() -> None:
        with memory.taken(60):
            begun.set()

    with memory.taken(50):
        thread = threading.Thread(target=other)
        thread.start()
        assert not begun.wait(0.1)
    thread.join(5)
    assert begun.is_set()
    with pytest.raises(UserError, match="needs about 200 bytes"), memory.taken(200):
        pass
    memory.give_up()
    with pytest.raises(StoppedError), memory.taken(1):
        pass


def test_a_run_that_fails_does_not_end_the_study(
    synthetic_dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, synthetic_dataset)
    status = cli.run(arguments(study, "--only", "full", "--memory", "1MB"))
    assert status == 1
    assert "failed: full, seed 0: needs about" in capsys.readouterr().err
    assert os.path.exists(tmp_path / "study" / "report.html")


def test_cells_are_made_anew_and_models_that_are_gone_keep_their_figures(
    synthetic_dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, synthetic_dataset)

    def full() -> tuple[Path, dict[str, float]]:
        """Returns where the model is, and what is known of it."""
        text = (tmp_path / "study" / "results.json").read_text(encoding="utf-8")
        (record,) = [r for r in json.loads(text) if r["run"] == "embedding.method=full"]
        (folder,) = (tmp_path / "work" / "runs").glob(f"{record['key']}-s0/*/")
        return folder, record["figures"]

    assert cli.run(arguments(study, "--only", "full")) == 0
    first, before = full()
    assert {"int8.auc", "inference.ratio"} <= before.keys()
    shutil.rmtree(first)
    capsys.readouterr()
    assert cli.run(arguments(study, "--only", "pruned*")) == 0
    assert "[2/2] pruned" in capsys.readouterr().err
    second, after = full()
    assert second != first
    assert after.keys() == before.keys()
    assert after["test.auc"] == before["test.auc"]
    assert after["inference.ratio"] == before["inference.ratio"]

    kept = set((tmp_path / "work" / "runs").glob("*/*/"))
    assert cli.run(arguments(study, "--only", "full", "--redo")) == 0
    third, anew = full()
    assert set((tmp_path / "work" / "runs").glob("*/*/")) == kept - {second} | {third}
    assert third != second
    assert anew.keys() == before.keys()


@pytest.mark.parametrize("encoding", ["vocabulary", "hash"])
def test_full_tables_need_not_be_possible(encoding: Encoding, tmp_path: Path) -> None:
    """Rows of 24 bytes are padded, and hashed ids have more rows than any table."""
    source = Synthetic(rows=2000, cardinalities=(50, 300), dense=1)
    dataset = prepare(source, tmp_path / "dataset", encoding=encoding)
    text = STUDY[: STUDY.index("[[methods]]")].replace('["int8"]', "[]")
    text += '[[methods]]\nname = "hash"\nbudgets = ["5kB"]\nset = { embedding.min_rows = 0 }\n'
    study = written(tmp_path, dataset, study=text)
    job = tmp_path / "job.toml"
    narrow = job.read_text(encoding="utf-8").replace("dim = 8", "dim = 6")
    job.write_text(narrow.replace('"adam"', '"rowwise_adagrad"'), encoding="utf-8")
    assert cli.run(arguments(study)) == 0
    (record,) = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    assert "error" not in record
    assert record["figures"]["bytes.tables"] <= 5000


def test_models_are_measured_as_served_where_they_fit(
    synthetic_dataset: PreparedDataset, tmp_path: Path
) -> None:
    study = load_study(written(tmp_path, synthetic_dataset))
    run = run_of(study, cells(study)[0], {})
    assert isinstance(run, Run)
    folder = tmp_path / "work" / "runs" / f"{run.key}-s0" / "run"
    folder.mkdir(parents=True)
    for name, content in ((JOB_FILE, ""), (MODEL, ""), (RESULT, '{"interrupted": false}')):
        (folder / name).write_text(content, encoding="utf-8")
    runner = Runner(
        study=study, work=tmp_path / "work", data=None, memory=Memory(1_000_000_000), threads=1
    )
    with pytest.raises(UserError, match="needs about 1,000,"):
        runner.served(run, 0, ["int8"], None)
