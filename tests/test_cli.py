"""The command line; real processes where exit status, streams and signals are at stake."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

import recsys_compress.track
from recsys_compress.cli import run
from recsys_compress.commands.common import print_json
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources import make_source
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.data.split import SPLITS
from recsys_compress.demo import demo, print_demo
from recsys_compress.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")

SYNTHETIC = ["rows=20000", "cardinalities=[20, 500, 5000]", "dense=2"]
JOB = """
[data]
path = "data"
[model.dcnv2]
cross_layers = 1
hidden = [16]
[embedding]
dim = 8
[train]
epochs = 2
batch_size = 500
threads = 1
"""
COLUMNS = """
dense = ["price"]
categorical = ["user"]
label = { column = "click" }
"""


@contextmanager
def command(*arguments: str | Path, cwd: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process that ends with the test."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(recsys_compress.__file__).parents[1])
    environment.pop("MLFLOW_TRACKING_URI", None)
    with subprocess.Popen(
        [sys.executable, "-m", "recsys_compress", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    """Runs a command to its end: status, standard output, standard error."""
    with command(*arguments, cwd=cwd) as process:
        out, err = process.communicate(timeout=110)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: MLflow makes its database once."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def job(place: Path) -> Path:
    """A job of seconds."""
    options = [part for option in SYNTHETIC for part in ("--option", option)]
    assert run(["prepare", "synthetic", "--out", str(place / "data"), *options]) == 0
    path = place / "job.toml"
    path.write_text(JOB)
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command that must fail as a user's error, and returns its one line."""
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


def test_help_imports_nothing_slow() -> None:
    heavy = {"torch", "mlflow", "pyarrow", "numpy", "matplotlib"}
    code = (
        "import sys; from recsys_compress.cli import run\n"
        "for line in ([], ['train', '--help'], ['methods', '--help']): assert run(line) == 0\n"
        f"sys.exit(str({heavy!r} & set(sys.modules)) if {heavy!r} & set(sys.modules) else 0)"
    )
    root = Path(recsys_compress.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        *("prepare", "profile", "train", "compress", "methods", "demo"),
        *("export", "register", "promote", "rollback", "score", "vectors", "serve"),
    ],
)
def test_every_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"Example: recsys-compress {name}" in " ".join(capsys.readouterr().out.split())


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'tain'. Did you mean 'train'?" in fails(capsys, "tain")
    assert "--sett" in fails(capsys, "train", "--sett", "a=1")
    assert "name a job file" in fails(capsys, "train")


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (float("-inf"),)}})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "c": {"d": [null]}}\n'


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"full", "hash", "unified"} <= set(found)
    for name, method in found.items():
        assert method["description"], name
        assert all(option["help"] for option in method["options"].values()), name
    assert run(["methods"]) == 0
    assert "unified: " in capsys.readouterr().out


def test_profile(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = job.parent / "data"
    assert run(["profile", str(dataset), "--dim", "8", "--json"]) == 0
    line = capsys.readouterr().out
    assert len(line.splitlines()) == 1
    assert "field_2" in json.dumps(json.loads(line))
    assert run(["profile", str(dataset)]) == 0
    assert "field_2" in capsys.readouterr().out


def test_a_dry_run_is_of_any_cluster(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"data.path={job.parent / 'data'}"
    arguments = ["train", str(job), "--set", data, "--dry-run", "--world-size", "16"]
    assert run([*arguments, "--hbm", "80GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world_size"], found["memory"]) == (16, 80 * 2**30)
    assert len(found["ranks"]) == 16
    assert "are missing" in fails(capsys, *arguments, "--hbm", "1kB")
    assert "add --dry-run" in fails(capsys, "train", job, "--hbm", "80GiB")


def test_train_prints_one_object_and_is_tracked(job: Path, place: Path) -> None:
    settings = ("--set", "embedding.method=unified", "--set", "embedding.budget=0.5x")
    status, out, err = finish("train", job, *settings, "--json", cwd=place)
    assert status == 0, err
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    for split in ("test", "valid"):
        assert {"auc", "logloss", "ne", "calibration"} <= set(result[split])
    assert {"tables", "full", "ratio", "optimizer"} <= set(result["bytes"])
    assert result["bytes"]["ratio"] >= 2
    assert {"samples_per_s", "peak_rss_bytes", "seconds"} <= set(result)
    assert not any(word in err for word in ("Warning", "WARNING", "INFO", "Gloo")), err

    recorded = MlflowClient(f"sqlite:///{place}/mlflow.db").get_run(result["run_id"])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["embedding.budget"] == "0.5x"
    assert recorded.data.metrics["test/auc"] == pytest.approx(result["test"]["auc"])
    saved = json.loads((place / result["folder"] / "result.json").read_text())
    assert saved["run_id"] == result["run_id"]


def test_a_trained_model_is_compressed_and_stored(
    job: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = finish("train", job, "--set", "train.epochs=1", "--json", cwd=place)
    assert status == 0, err
    full = json.loads(out)
    less = ("compress", full["folder"], "--method", "low_rank", "--budget", "0.6x")
    status, out, err = finish(*less, "--set", "train.epochs=1", "--json", cwd=place)
    assert status == 0, err
    result = json.loads(out)
    assert result["bytes"]["model"] <= 0.6 * full["bytes"]["model"]
    assert result["before"]["test"] == full["test"]
    recorded = MlflowClient(f"sqlite:///{place}/mlflow.db").get_run(result["run_id"])
    assert recorded.data.tags["parent.folder"] == full["folder"]

    status, out, err = finish("compress", result["folder"], "--storage", "int8", cwd=place)
    assert status == 0, err
    assert "as stored" in out
    monkeypatch.chdir(place)
    folder = full["folder"]
    assert "give either --method or --storage" in fails(capsys, "compress", folder)
    stored = fails(capsys, "compress", folder, "--storage", "int8", "--set", "train.epochs=1")
    assert "--budget and --set go with --method" in stored
    assert "no table 'x'" in fails(capsys, "compress", folder, "--storage", "x=int8")
    assert "did you mean 'int8'?" in fails(capsys, "compress", folder, "--storage", "int9")
    assert "is unknown" in fails(capsys, "compress", folder, "--method", "lowrank")
    calls = ("compress none --method dnis", "compress none --storage int8", "register none")
    for given in (*calls, "train --resume none", "export none --out artifact"):
        assert fails(capsys, *given.split()).startswith("error: none: is no run's folder")


def test_an_interrupt_leaves_a_run_to_resume(job: Path, place: Path) -> None:
    longer = ("--set", "train.epochs=15", "--set", "train.patience=15")
    with command("train", job, *longer, "--json", cwd=place) as process:
        await_line(process.stderr, "step ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    first = json.loads(out)
    assert first["interrupted"]
    assert f"train --resume {first['folder']}" in err

    status, out, err = finish("train", "--resume", first["folder"], "--json", cwd=place)
    assert status == 0, err
    second = json.loads(out)
    assert second["run_id"] == first["run_id"]
    assert second["steps"] > first["steps"]
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    assert client.get_run(second["run_id"]).info.status == "FINISHED"


def test_an_interrupted_plan_leaves_none(job: Path, place: Path) -> None:
    plan = ("plan", job, "--budget", "0.5x", "--grade", "probes", "--probe-epochs", "15")
    longer = ("--set", "train.patience=15", "--set", f"train.output={place / 'short'}")
    with command(*plan, *longer, cwd=place) as process:
        await_line(process.stderr, "step ")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list(place.glob("plan.*"))


def await_line(stream: IO[str] | None, word: str) -> None:
    assert stream is not None
    for line in stream:
        if word in line:
            return
    raise AssertionError(f"no line with {word!r}")


def test_demo_runs_again_on_the_same_data(
    job: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    source = Synthetic(rows=3000, cardinalities=(300, 500), dense=1)
    demo(Path("demo"), source=source, budgets=["0.5x"])
    written = (place / "demo/data/dataset.json").stat().st_mtime_ns
    found = demo(Path("demo"), source=source, budgets=["0.5x"])
    assert (place / "demo/data/dataset.json").stat().st_mtime_ns == written
    print_demo(found)
    full, unified = (line.split() for line in capsys.readouterr().out.splitlines()[3:5])
    assert (full[0], full[3]) == ("full", "1.0x")
    assert unified[0] == "unified"
    assert float(unified[3].rstrip("x")) >= 2
    assert found.plot.read_bytes().startswith(b"\x89PNG")
    assert [run["method"] for run in found.to_json()["runs"]] == ["full", "unified"]

    other = Synthetic(rows=2000, cardinalities=(300, 500), dense=1)
    demo(Path("demo"), source=other, budgets=[])
    assert sum(PreparedDataset.open("demo/data").rows(split) for split in SPLITS) == 2000


def test_demo_spares_other_data(tmp_path: Path) -> None:
    pq.write_table(rows(), tmp_path / "raw.parquet")
    (tmp_path / "columns.toml").write_text(COLUMNS)
    source = make_source(
        "parquet",
        {"path": str(tmp_path / "raw.parquet"), "schema_file": str(tmp_path / "columns.toml")},
    )
    prepare(source, tmp_path / "data")
    with pytest.raises(UserError, match="holds other data"):
        demo(tmp_path)
    assert PreparedDataset.open(tmp_path / "data").manifest.source == "parquet"


def test_bad_jobs_leave_nothing(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()

    def train(*settings: str) -> str:
        settings = (f"data.path={job.parent / 'data'}", *settings)
        return fails(capsys, "train", job, *(part for s in settings for part in ("--set", s)))

    assert "did you mean 'budget'?" in train("embedding.budgett=0.1x")
    assert "train.epochs" in train("train.epochs=many")
    assert "did you mean 'unified'?" in train("embedding.method=unifed")
    assert "out of reach" in train("embedding.method=unified", "embedding.budget=10B")
    assert "is no prepared dataset" in train("data.path=nowhere")
    assert "cannot be reached" in train("tracking.uri=http://127.0.0.1:9")
    assert "cannot be written" in train("train.output=file")
    assert "none.toml: cannot be read" in fails(capsys, "train", "none.toml")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def rows(**changes: list[object]) -> pa.Table:
    """A hundred good rows, some columns changed."""
    good = {"click": [0, 1] * 50, "price": [0.5, 1.5] * 50, "user": ["a", "b"] * 50}
    return pa.table({name: values for name, values in (good | changes).items() if values})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": []}, "'user'"),
        ({"user": [0.5] * 100}, "'user' is double; ids must be integers or strings"),
        ({"price": ["dear"] * 100}, "'price' is string; it must hold numbers"),
        ({"click": [0, 2] * 50}, "'click' is 2"),
        ({"click": [0, None] * 50}, "'click' is None"),
        ({"price": [1.0, math.nan] * 50}, "'price' is nan in row 2"),
        ({"price": [math.inf, 1.0] * 50}, "'price' is inf in row 1"),
    ],
)
def test_bad_rows_leave_nothing(
    changes: dict[str, list[object]],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pq.write_table(rows(**changes), tmp_path / "raw.parquet")
    assert message in fails_to_prepare(capsys, tmp_path)


def test_bad_files_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw.parquet"
    assert "raw.parquet" in fails_to_prepare(capsys, tmp_path)
    raw.touch()
    assert "raw.parquet: cannot be read" in fails_to_prepare(capsys, tmp_path)
    pq.write_table(rows().slice(0, 0), raw)
    assert "no rows" in fails_to_prepare(capsys, tmp_path)
    pq.write_table(rows(), raw)
    raw.write_bytes(raw.read_bytes()[:-10])
    assert "raw.parquet: cannot be read" in fails_to_prepare(capsys, tmp_path)
    raw.unlink()
    raw.mkdir()
    pq.write_table(rows(), raw / "a.parquet")
    pq.write_table(rows(user=[1, 2] * 50), raw / "b.parquet")
    assert "ids must be of one type" in fails_to_prepare(capsys, tmp_path)


def test_bad_places_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(rows(), tmp_path / "raw.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not an empty folder" in fails_to_prepare(capsys, tmp_path, out="full")
    below = "raw.parquet/below"
    assert "cannot be written" in fails_to_prepare(capsys, tmp_path, out=below)
    assert "did you mean 'frappe'?" in fails_to_prepare(capsys, tmp_path, source="frape")
    assert "'rows'" in fails_to_prepare(capsys, tmp_path, "--option", "rows=1")
    assert "key=value" in fails_to_prepare(capsys, tmp_path, "--option", "rows")


def fails_to_prepare(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    *arguments: str,
    source: str = "parquet",
    out: str = "out",
) -> str:
    columns = folder / "columns.toml"
    columns.write_text(COLUMNS)
    before = set(folder.rglob("*"))
    places = ("--from", folder / "raw.parquet", "--schema", columns, "--out", folder / out)
    line = fails(capsys, "prepare", source, *places, *arguments)
    assert set(folder.rglob("*")) == before
    return line
