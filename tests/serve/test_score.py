"""Scores of files: all rows, in order, whole or absent, and resumed after whatever stopped them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recsys_compress
from recsys_compress.errors import UserError
from recsys_compress.serve.predictor import Predictor
from recsys_compress.serve.score import score
from tests.serve.clicks import raw_rows

LIMITED = """
import resource, sys
from pathlib import Path
from recsys_compress.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 6,000 rows in row groups of no round size."""
    folder = tmp_path_factory.mktemp("rows")
    table = raw_rows(12_000).append_column("number", pa.array(range(12_000)))
    pq.write_table(table.slice(0, 6000), folder / "a.parquet", row_group_size=1700)
    pq.write_table(table.slice(6000), folder / "b.parquet", row_group_size=2300)
    return folder


def expected(artifact: Path, rows: Path) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    return Predictor.load(artifact).predict(rows)


def assert_scored(output: Path, artifact: Path, rows: Path) -> None:
    found = pq.read_table(output)
    assert found.column_names == ["number", "score"]
    assert found["number"].to_pylist() == list(range(12_000))
    assert found["score"].type == pa.float32()
    np.testing.assert_allclose(found["score"].to_numpy(), expected(artifact, rows), atol=1e-6)
    assert sorted(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("part_rows", [1000, 5000, 1 << 18])
def test_all_rows_in_order(artifact: Path, rows: Path, tmp_path: Path, part_rows: int) -> None:
    output = tmp_path / "scores.parquet"
    found = score(artifact, str(rows), output, keep=["number"], part_rows=part_rows)
    assert (found.rows, found.resumed_rows) == (12_000, 0)
    assert_scored(output, artifact, rows)
    again = score(artifact, str(rows), output, keep=["number"], part_rows=part_rows)
    assert again.resumed_rows == 0
    assert_scored(output, artifact, rows)


def test_no_rows_make_a_file_without_rows(artifact: Path, tmp_path: Path) -> None:
    pq.write_table(raw_rows(5).slice(0, 0), tmp_path / "rows.parquet")
    score(artifact, str(tmp_path / "rows.parquet"), tmp_path / "out" / "scores.parquet")
    assert pq.read_table(tmp_path / "out" / "scores.parquet").num_rows == 0


@pytest.mark.parametrize("done", [1, 3])
def test_goes_on_behind_the_last_whole_part(
    artifact: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    output = tmp_path / "scores.parquet"
    real, left = pq.write_table, [done]

    def fails_later(*arguments: object, **more: object) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        real(*arguments, **more)

    monkeypatch.setattr(pq, "write_table", fails_later)
    with pytest.raises(UserError, match=rf"No space left.*; {done * 2500:,} of 12,000 rows are"):
        score(artifact, str(rows), output, keep=["number"], part_rows=2500)
    assert not output.exists()
    monkeypatch.undo()
    found = score(artifact, str(rows), output, keep=["number"], part_rows=2500)
    assert found.resumed_rows == done * 2500
    assert_scored(output, artifact, rows)


def test_other_rows_or_columns_begin_anew(
    artifact: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.parquet"
    monkeypatch.setattr("recsys_compress.serve.score._join", _full)
    with pytest.raises(UserError, match="12,000 of 12,000 rows are done"):
        score(artifact, str(rows), output, part_rows=2500)
    monkeypatch.undo()
    found = score(artifact, str(rows), output, keep=["number"], part_rows=2500)
    assert found.resumed_rows == 0
    assert_scored(output, artifact, rows)


def _full(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_one_line_and_the_next_run_finishes(
    artifact: Path, rows: Path, tmp_path: Path
) -> None:
    """The kernel itself refuses to let the file grow."""
    output = tmp_path / "scores.parquet"
    arguments = ["score", "--model", artifact, "--input", rows, "--output", output]
    command = [sys.executable, "-c", LIMITED, "20000", *arguments, "--keep", "number"]
    environment = os.environ | {"PYTHONPATH": str(Path(recsys_compress.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written (" in done.stderr.splitlines()[-1]
    assert not output.exists()
    score(artifact, str(rows), output, keep=["number"])
    assert_scored(output, artifact, rows)


@pytest.mark.parametrize(
    ("keep", "message"),
    [("numbr", "column 'numbr' is missing; did you mean 'number'"), ("score", "is missing")],
)
def test_columns_that_are_not_there(
    artifact: Path, rows: Path, tmp_path: Path, keep: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        score(artifact, str(rows), tmp_path / "scores.parquet", keep=[keep])
    assert list(tmp_path.iterdir()) == []


def test_a_bad_value_names_its_file_and_row(artifact: Path, tmp_path: Path) -> None:
    table = raw_rows(100)
    price = table["price"].to_pylist()
    price[77] = float("inf")
    place = table.column_names.index("price")
    pq.write_table(table.set_column(place, "price", pa.array(price)), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet: column 'price' is inf in row 78"):
        score(artifact, str(tmp_path / "rows.parquet"), tmp_path / "scores.parquet")


def test_rows_are_not_overwritten_by_their_scores(
    artifact: Path, rows: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(rows, tmp_path / "rows"))
    before = (folder / "a.parquet").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(folder)
    for given in (folder, folder / "a.parquet", folder / "?.parquet", link):
        with pytest.raises(UserError, match=r"a\.parquet: is among the rows to score"):
            score(artifact, str(given), folder / "a.parquet")
    assert (folder / "a.parquet").read_bytes() == before


def test_scores_do_not_become_rows_of_the_next_run(
    artifact: Path, rows: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(rows, tmp_path / "rows"))
    for given in (folder, folder / "*.parquet", tmp_path / "*" / "*.parquet"):
        with pytest.raises(UserError, match=r"is among the rows .*; name a file elsewhere"):
            score(artifact, str(given), folder / "scores.parquet")
    score(artifact, str(folder / "*.parquet"), folder / "out" / "scores.parquet")
    score(artifact, str(folder / "?.parquet"), folder / "scores.parquet")


def test_two_runs_do_not_write_one_output_at_once(
    artifact: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scores.parquet"
    real, refused = pq.write_table, []

    def another_begins(*arguments: object, **more: object) -> None:
        with pytest.raises(UserError, match="another process is writing there"):
            score(artifact, str(rows / "a.parquet"), output)
        refused.append(True)
        real(*arguments, **more)

    monkeypatch.setattr(pq, "write_table", another_begins)
    score(artifact, str(rows), output, keep=["number"], part_rows=5000)
    assert len(refused) == 3
    assert_scored(output, artifact, rows)


def test_columns_kept_have_a_type_that_holds_those_of_all_files(
    artifact: Path, tmp_path: Path
) -> None:
    for number, kept in enumerate([pa.nulls(2), pa.array([1, 2], pa.int32()), pa.array([3, 4])]):
        table = raw_rows(2).append_column("kept", kept)
        pq.write_table(table, tmp_path / f"{number}.parquet")
    output = tmp_path / "out" / "scores.parquet"
    score(artifact, str(tmp_path / "*.parquet"), output, keep=["kept", "kept"])
    found = pq.read_table(output)
    assert found.column_names == ["kept", "score"]
    assert found["kept"].type == pa.int64()
    assert found["kept"].to_pylist() == [None, None, 1, 2, 3, 4]
    table = raw_rows(2).append_column("kept", pa.array(["a", "b"]))
    pq.write_table(table, tmp_path / "3.parquet")
    with pytest.raises(UserError, match=r"3\.parquet: a column to keep is of another type"):
        score(artifact, str(tmp_path / "*.parquet"), output, keep=["kept"])


def test_columns_that_are_there_twice_are_refused(artifact: Path, tmp_path: Path) -> None:
    for name in ("user", "kept"):
        table = raw_rows(2).append_column("kept", pa.array([1, 2]))
        pq.write_table(table.append_column(name, table[name]), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=f"column '{name}' is there 2 times; rename"):
            score(artifact, str(tmp_path / "rows.parquet"), tmp_path / "out", keep=["kept"])


def test_an_output_that_is_a_folder_is_refused(artifact: Path, rows: Path, tmp_path: Path) -> None:
    for output in (tmp_path, Path()):
        with pytest.raises(UserError, match="is a folder; name a Parquet file"):
            score(artifact, str(rows), output)
