"""The sources of known data sets, on the data themselves where they are at hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.reader import Reader
from recsys_compress.data.sources.criteo import Criteo
from recsys_compress.data.sources.frappe import Frappe
from recsys_compress.data.sources.movielens import MovieLens1M
from recsys_compress.data.sources.tabular import Tabular
from recsys_compress.data.split import SPLITS

SCHEMAS = Path(__file__).parents[2] / "data"


def shapes(dataset: PreparedDataset) -> list[int]:
    return [dataset.rows(split) for split in SPLITS]


def test_movielens(shared_data: Path, tmp_path: Path) -> None:
    source = MovieLens1M(path=str(shared_data / "movielens-1m"), genres=True)
    dataset = prepare(source, tmp_path / "out")
    assert sum(shapes(dataset)) == 739_012
    assert shapes(dataset)[0] == pytest.approx(0.8 * 739_012, rel=0.01)
    ids = sum(field.num_embeddings - 2 for field in dataset.schema.categorical[:6])
    assert 13_000 < ids <= 13_177
    assert [field.name for field in dataset.schema.categorical] == [
        "user_id", "movie_id", "gender", "age", "occupation", "zip", "genres",
    ]  # fmt: skip
    _check_joins(dataset, shared_data / "movielens-1m")


def _check_joins(dataset: PreparedDataset, raw: Path) -> None:
    """Compares decoded rows with the raw tables."""
    ratings = pq.read_table(raw / "ratings.parquet").to_pandas()
    likes = ratings.set_index(["user_id", "movie_id"])["rating"]
    users = pq.read_table(raw / "users.parquet").to_pandas().set_index("user_id")
    films = pq.read_table(raw / "movies.parquet").to_pandas().set_index("movie_id")
    table = pq.read_table(dataset.files("test")[0]).slice(0, 300)
    decoded = {
        field.name: dataset.vocabulary(field.name).take(pc.list_flatten(table[field.name]))
        if field.multi_valued
        else dataset.vocabulary(field.name).take(table[field.name])
        for field in dataset.schema.categorical
    }
    row = {name: values.to_pylist() for name, values in decoded.items()}
    genres: list[str] = []
    for index, label in enumerate(table["label"].to_pylist()):
        user, film = row["user_id"][index], row["movie_id"][index]
        if user is None or film is None:
            pytest.fail("a user or film of the test split unknown to training: choose other rows")
        assert label == (likes[user, film] >= 4)
        assert likes[user, film] != 3
        for name in ("gender", "age", "occupation"):
            assert row[name][index] == users[name][user]
        genres += films["genres"][film].split("|")
    assert row["genres"] == genres


def test_movielens_in_its_original_format(tmp_path: Path) -> None:
    """GroupLens's own files: double colons, Latin-1, colons in titles."""
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [f"{1 + row % 3}::{1 + row % 2}::{1 + row % 5}::97830{row}" for row in range(200)]
    (raw / "ratings.dat").write_text("\n".join(lines))
    (raw / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n")
    movies = "1::Star Wars: Episode I::Action|Sci-Fi\n2::Cité des enfants perdus, La::Drama\n"
    (raw / "movies.dat").write_text(movies, encoding="latin1")
    dataset = prepare(MovieLens1M(path=str(raw), genres=True), tmp_path / "out")
    assert sum(shapes(dataset)) == 160
    rate = sum(dataset.manifest.splits[s].label_rate * dataset.rows(s) for s in SPLITS)
    assert rate == pytest.approx(80)
    assert set(dataset.vocabulary("zip").to_pylist()[2:]) == {"48067", "70072", "55117"}
    assert set(dataset.vocabulary("genres").to_pylist()[2:]) == {"Action", "Sci-Fi", "Drama"}


def test_frappe(shared_data: Path, tmp_path: Path) -> None:
    dataset = prepare(Frappe(path=str(shared_data / "frappe")), tmp_path / "out")
    assert shapes(dataset) == [202_005, 57_722, 28_860]
    assert len(dataset.schema.categorical) == 10
    assert sum(field.num_embeddings - 2 for field in dataset.schema.categorical) <= 5382


def test_frappe_from_csv(shared_data: Path, tmp_path: Path) -> None:
    """CSV of the same rows gives the same dataset."""
    raw = tmp_path / "raw"
    for folder in ("csv", "parquet"):
        (raw / folder).mkdir(parents=True)
    for split in SPLITS:
        table = pq.read_table(shared_data / "frappe" / f"{split}.parquet").slice(0, 500)
        pa.csv.write_csv(table, raw / "csv" / f"{split}.csv")
        pq.write_table(table, raw / "parquet" / f"{split}.parquet")
    made = [prepare(Frappe(path=str(raw / f)), tmp_path / f) for f in ("csv", "parquet")]
    assert made[0].checksum == made[1].checksum


def test_criteo(shared_data: Path, tmp_path: Path) -> None:
    source = Criteo(path=str(shared_data / "criteo"), split="ordered")
    dataset = prepare(source, tmp_path / "out")
    assert shapes(dataset) == [8000, 1000, 1000]
    assert (len(dataset.schema.dense), len(dataset.schema.categorical)) == (13, 26)
    train = pq.read_table(dataset.files("train")[0])
    first = (shared_data / "criteo" / "first_10000_rows.tsv").read_text().split("\n")[0].split("\t")
    counts = [0 if value == "" else int(value) for value in first[1:14]]
    expected = [np.log(count + (4 if index == 1 else 1)) for index, count in enumerate(counts)]
    assert first[12] == ""
    np.testing.assert_allclose([train[name][0].as_py() for name in dataset.schema.dense], expected)
    for name, value in zip([f"C{i}" for i in range(1, 27)], first[14:], strict=True):
        raw = dataset.vocabulary(name)[train[name][0].as_py()].as_py()
        assert raw == (value or None)


def test_criteo_missing_counts_are_zero(tmp_path: Path) -> None:
    lines = ["\t".join(["1", *[""] * 13, *["a"] * 26]), "\t".join(["0", *["-5"] * 13, *[""] * 26])]
    (tmp_path / "day.tsv").write_text("\n".join(lines * 50))
    dataset = prepare(Criteo(path=str(tmp_path / "day.tsv")), tmp_path / "out")
    assert all(s.min == s.max == 0 for s in dataset.manifest.dense.values())
    assert dataset.frequencies("C26")[0] > 0


@pytest.mark.parametrize(("name", "rows"), [("talkingdata", 100_000), ("gowalla", 1_027_370)])
def test_schemas_of_known_data_sets(
    shared_data: Path, tmp_path: Path, name: str, rows: int
) -> None:
    source = Tabular(path=str(shared_data / name), schema_file=str(SCHEMAS / f"{name}.toml"))
    dataset = prepare(source, tmp_path / "out")
    assert sum(shapes(dataset)) == rows
    read = sum(len(batch) for batch in Reader(dataset, "test", batch_size=5000))
    assert read == dataset.rows("test")
