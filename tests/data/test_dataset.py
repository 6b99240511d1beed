import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recsys_compress.data.dataset import MANIFEST, PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.reader import Reader
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError


@pytest.fixture
def copy(synthetic_dataset: PreparedDataset, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(synthetic_dataset.path, tmp_path / "copy"))


def test_opens_what_was_prepared(synthetic_dataset: PreparedDataset) -> None:
    opened = PreparedDataset.open(synthetic_dataset.path)
    opened.verify()
    assert opened.manifest == synthetic_dataset.manifest
    assert [field.name for field in opened.schema.categorical] == [
        f"field_{index}" for index in range(4)
    ]
    assert opened.schema.dense == ("dense_0", "dense_1")


def test_rows_and_files_are_those_on_disk(synthetic_dataset: PreparedDataset) -> None:
    total = 0
    for split in ("train", "valid", "test"):
        found = [pq.read_metadata(path).num_rows for path in synthetic_dataset.files(split)]
        assert sum(found) == synthetic_dataset.rows(split)
        assert all(rows == 6000 for rows in found[:-1])
        total += sum(found)
    assert total == 20_000


def test_frequencies_count_the_training_split(synthetic_dataset: PreparedDataset) -> None:
    for field in synthetic_dataset.schema.categorical:
        counts = synthetic_dataset.frequencies(field.name)
        stored = [
            id_
            for path in synthetic_dataset.files("train")
            for id_ in pq.read_table(path)[field.name].to_pylist()
        ]
        assert len(counts) == field.num_embeddings
        assert counts.tolist() == [0] * 2 + [stored.count(id_) for id_ in range(2, len(counts))]
        assert (counts[3:] <= counts[2:-1]).all()


def test_equal_sources_give_equal_checksums(tmp_path: Path) -> None:
    def made(name: str, **options: int) -> str:
        source = Synthetic(rows=3000, cardinalities=(5, 50), dense=2)
        return prepare(source, tmp_path / name, **options).checksum

    first = made("first")
    assert made("again") == first
    assert made("small_chunks", chunk_rows=7) == first
    assert made("other_split", seed=1) != first


def test_hash_encoding_has_counts_but_no_vocabulary(tmp_path: Path) -> None:
    source = Synthetic(rows=3000, cardinalities=(50,), dense=0)
    dataset = prepare(source, tmp_path / "hashed", encoding="hash")
    ids, counts = dataset.id_counts("field_0")
    assert ids[:2].tolist() == [0, 1]
    assert counts.sum() == dataset.rows("train")
    with pytest.raises(UserError, match="field 'field_0' is hash-encoded and has no vocabulary"):
        dataset.vocabulary("field_0")
    with pytest.raises(UserError, match="has no field 'field_1'; did you mean 'field_0'"):
        dataset.id_counts("field_1")
    assert sum(len(batch) for batch in Reader(dataset, "test", batch_size=9)) == dataset.rows(
        "test"
    )


def test_a_folder_without_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no prepared dataset"):
        PreparedDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has format None, this version reads 1"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1}', "key .* is missing"),
    ],
)
def test_a_bad_manifest(copy: Path, text: str, message: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        PreparedDataset.open(copy)


def test_a_missing_shard(copy: Path) -> None:
    (copy / "valid" / "00000.parquet").unlink()
    with pytest.raises(UserError, match=r"valid/00000\.parquet: is missing"):
        PreparedDataset.open(copy)


def test_a_truncated_shard(copy: Path) -> None:
    shard = copy / "train" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train/00001\.parquet: has \d+ bytes, not \d+"):
        PreparedDataset.open(copy)


def test_verify_finds_one_changed_byte(copy: Path) -> None:
    shard = copy / "ids" / "field_1.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"ids/field_1\.parquet: has changed"):
        PreparedDataset.open(copy).verify()


def test_verify_finds_an_edited_schema(copy: Path) -> None:
    raw = json.loads((copy / MANIFEST).read_text())
    raw["schema"]["categorical"][0]["num_embeddings"] = 3
    (copy / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"dataset\.json: has been edited"):
        PreparedDataset.open(copy).verify()
