import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_tables import TOML, columns, tabular, write

from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.source import Chunk
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.data.split import SPLITS, ordered_split, random_split
from recsys_compress.errors import UserError

EIGHTY = (0.8, 0.1, 0.1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 99))
def test_random_split_does_not_depend_on_chunks(sizes: list[int], seed: int) -> None:
    whole = random_split(0, sum(sizes), EIGHTY, seed)
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [random_split(int(a), n, EIGHTY, seed) for a, n in zip(starts, sizes, strict=True)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_random_split_has_the_shares_asked_for() -> None:
    counts = np.bincount(random_split(0, 100_000, (0.5, 0.3, 0.2), 0))
    np.testing.assert_allclose(counts / 100_000, [0.5, 0.3, 0.2], atol=0.01)


def test_ordered_split_cuts_once() -> None:
    assert ordered_split(0, 10, EIGHTY, 10).tolist() == [0] * 8 + [1, 2]


def test_vocabulary_comes_from_the_training_split_alone(tmp_path: Path) -> None:
    raw = columns(30)
    raw["user"] = [*range(20), *range(100, 110)]
    raw["part"] = ["a"] * 20 + ["b"] * 5 + ["c"] * 5
    toml = f'{TOML}[split]\ncolumn = "part"\ntrain = ["a"]\nvalid = ["b"]\ntest = ["c"]\n'
    dataset = prepare(tabular(tmp_path, write(tmp_path, raw), toml), tmp_path / "out")
    assert [dataset.rows(split) for split in SPLITS] == [20, 5, 5]
    assert dataset.vocabulary("user").to_pylist() == [None, None, *range(20)]
    for split in ("valid", "test"):
        assert set(pq.read_table(dataset.files(split)[0])["user"].to_pylist()) == {1}
    statistics = dataset.manifest.dense["price"]
    assert statistics.mean == pytest.approx(np.mean(raw["price"][:20]))
    assert statistics.std == pytest.approx(np.std(raw["price"][:20]))
    assert (statistics.min, statistics.max) == pytest.approx((0, 1.9))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".arrow", ".feather"])
def test_every_file_format_gives_the_same_dataset(tmp_path: Path, suffix: str) -> None:
    import pyarrow as pa
    import pyarrow.csv

    raw = columns()
    raw["user"] = [None if user == 3 else f"u{user}" for user in raw["user"]]
    expected = prepare(tabular(tmp_path, write(tmp_path, raw)), tmp_path / "expected")
    table, path = pa.table(raw), tmp_path / f"raw{suffix}"
    if suffix in (".csv", ".tsv"):
        options = pa.csv.WriteOptions(delimiter="\t" if suffix == ".tsv" else ",")
        pa.csv.write_csv(table, path, options)
    elif suffix != ".parquet":
        new = pa.ipc.new_file if suffix == ".arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    dataset = prepare(tabular(tmp_path, path), tmp_path / "out", chunk_rows=11)
    assert dataset.checksum == expected.checksum
    assert dataset.frequencies("user")[0] > 0


def test_a_folder_of_files_is_read_in_order(tmp_path: Path) -> None:
    for part in range(3):
        raw = columns(30)
        raw["price"] = [float(part)] * 30
        write(tmp_path / "raw", raw, f"part{part}.parquet")
    toml = f'{TOML}[split]\norder = "stored"\nfractions = [0.5, 0.25, 0.25]\n'
    dataset = prepare(tabular(tmp_path, tmp_path / "raw", toml), tmp_path / "out")
    prices = [
        price
        for split in SPLITS
        for price in pq.read_table(dataset.files(split)[0])["price"].to_pylist()
    ]
    assert prices == [0.0] * 30 + [1.0] * 30 + [2.0] * 30


@pytest.mark.parametrize(
    ("rule", "positives"), [(">=3", 4), ("> 3", 3), ("==6", 1), ("!= 6", 6), ("<1", 1), ("<=1", 2)]
)
def test_label_rules(tmp_path: Path, rule: str, positives: int) -> None:
    raw = columns(70)
    toml = f'categorical = ["price"]\n[label]\ncolumn = "user"\npositive = "{rule}"\n'
    raw["price"] = raw["click"]
    dataset = prepare(tabular(tmp_path, write(tmp_path, raw), toml), tmp_path / "out")
    rates = [dataset.manifest.splits[s].label_rate * dataset.rows(s) for s in SPLITS]
    assert sum(rates) == pytest.approx(10 * positives)


def test_text_makes_integers_strings(tmp_path: Path) -> None:
    toml = TOML.replace("dense", 'text = ["user"]\ndense')
    dataset = prepare(tabular(tmp_path, write(tmp_path, columns()), toml), tmp_path / "out")
    assert set(dataset.vocabulary("user").to_pylist()[2:]) == set("0123456")


class Failing(Synthetic):
    """Fails in its second pass."""

    passes: ClassVar[list[int]] = []

    def chunks(self, rows: int) -> Iterator[Chunk]:
        self.passes.append(rows)
        for index, chunk in enumerate(super().chunks(rows)):
            if len(self.passes) == 2 and index == 3:
                raise UserError("gone")
            yield chunk


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    Failing.passes.clear()
    source = Failing(rows=2000, cardinalities=(5,))
    with pytest.raises(UserError, match="gone"):
        prepare(source, tmp_path / "out", chunk_rows=400, row_group_rows=100)
    assert source.passes == [400, 400]
    assert list(tmp_path.iterdir()) == []


def test_progress_is_lines_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(Synthetic(rows=1234, cardinalities=(5,)), tmp_path / "out", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "counting ids: 1,234 rows, " in captured.err
    assert "writing: 1,234 rows, " in captured.err


PEAK = """
import re, sys
from pathlib import Path
from recsys_compress.data.prepare import prepare
from recsys_compress.data.sources.synthetic import Synthetic
source = Synthetic(rows=int(sys.argv[1]), cardinalities=(10, 1000, 1000, 1000), dense=2)
sizes = {"chunk_rows": 1 << 15, "row_group_rows": 1 << 14, "rows_per_file": 1 << 16}
prepare(source, Path(sys.argv[2]), **sizes)
# getrusage's peak would include that of the process which started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    """800,000 more rows are 33 MB of raw columns and 20 MB of encoded ones: none may stay."""

    def peak(rows: int) -> int:
        command = [sys.executable, "-c", PEAK, str(rows), str(tmp_path / str(rows))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        output = subprocess.check_output(command, env=environment)
        return int(output) * 1024

    assert peak(1_000_000) - peak(200_000) < 12e6
