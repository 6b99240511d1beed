import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from raw_tables import tabular, write

from recsys_compress.data.batch import Batch
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.prepare import prepare
from recsys_compress.data.reader import Reader
from recsys_compress.data.sources.synthetic import Synthetic
from recsys_compress.errors import UserError

ROWS = 600
TOML = """
dense = ["row"]
categorical = ["user"]
weight = "importance"
[label]
column = "click"
[[multi_valued]]
column = "tags"
weights = "strengths"
[[multi_valued]]
column = "words"
separator = " "
pooling = "mean"
[[time]]
column = "seen"
parts = ["hour"]
"""


def bag(row: int) -> list[int]:
    return [row + step for step in range(row % 4)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Every kind of column; dense feature `row` tells which raw row it is."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = range(ROWS)
    raw = {
        "row": [float(row) for row in rows],
        "user": [row % 50 for row in rows],
        "importance": [1 + row / ROWS for row in rows],
        "click": [row % 2 for row in rows],
        "tags": [bag(row) for row in rows],
        "strengths": [[tag / 7 for tag in bag(row)] for row in rows],
        "words": [" ".join(f"w{tag % 9}" for tag in bag(row)) for row in rows],
        "seen": ["2017-11-07 09:30:38"] * ROWS,
    }
    source = tabular(folder, write(folder, raw), TOML)
    return prepare(source, folder / "out", row_group_rows=37, rows_per_file=100)


def same(first: Batch, second: Batch) -> bool:
    pairs = [
        (first.dense, second.dense),
        (first.labels, second.labels),
        (first.sparse.values(), second.sparse.values()),
        (first.sparse.lengths(), second.sparse.lengths()),
    ]
    return all(torch.equal(a, b) for a, b in pairs)


# The last batch is longer for the last of four streams than a share that is rounded up would allow.
@example(world_size=4, streams=4, batch_size=13, buffer_rows=50, shuffle=True, epoch=0)
@example(world_size=2, streams=7, batch_size=6, buffer_rows=50, shuffle=True, epoch=0)
@settings(max_examples=40)
@given(
    world_size=st.integers(1, 5),
    streams=st.integers(1, 7),
    batch_size=st.integers(6, 200),
    buffer_rows=st.integers(1, 700),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_once(
    mixed: PreparedDataset,
    world_size: int,
    streams: int,
    batch_size: int,
    buffer_rows: int,
    shuffle: bool,
    epoch: int,
) -> None:
    """All ranks have as many batches of one size; together they hold the same, however many."""

    def read(rank: int, world_size: int) -> list[Batch]:
        reader = Reader(
            mixed,
            "train",
            batch_size=batch_size,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            streams=streams,
            buffer_rows=buffer_rows,
        )
        batches = list(reader.epoch(epoch))
        assert len(batches) == len(reader)
        return batches

    alone = read(0, 1)
    seen = []
    for whole, *parts in zip(alone, *(read(r, world_size) for r in range(world_size)), strict=True):
        assert whole.total == len(whole) == sum(len(part) for part in parts)
        assert {part.total for part in parts} == {whole.total}
        assert len({len(part.labels) for part in parts}) == 1
        rows = [row for part in parts for row in part.dense[: len(part), 0].tolist()]
        assert rows == whole.dense[:, 0].tolist()
        for part in parts:
            own = slice(len(part), None)  # the padding
            assert part.weights is not None
            assert not part.weights[own].any()
            assert not part.sparse.lengths().view(len(part.sparse.keys()), -1)[:, own].any()
        seen += rows
    assert len(seen) == mixed.rows("train")
    assert len(set(seen)) == mixed.rows("train")


@settings(max_examples=25)
@given(data=st.data(), batch_size=st.integers(20, 90), buffer_rows=st.integers(1, 400))
def test_resumes_at_any_batch(
    mixed: PreparedDataset, data: st.DataObject, batch_size: int, buffer_rows: int
) -> None:
    def reader() -> Reader:
        return Reader(
            mixed, "train", batch_size=batch_size, seed=3, shuffle=True, buffer_rows=buffer_rows
        )

    whole = reader()
    all_batches = [batch for _ in range(2) for batch in whole]
    first = reader()
    stop = data.draw(st.integers(1, len(all_batches)))
    iterator = chain_epochs(first)
    for _ in range(stop):
        next(iterator)
    second = reader()
    second.load_state_dict(first.state_dict())
    rest = list(second) + (list(second) if stop < len(whole) else [])
    assert all(same(a, b) for a, b in zip(rest, all_batches[stop:], strict=False))
    assert len(rest) >= len(all_batches) - stop


def chain_epochs(reader: Reader) -> Iterator[Batch]:
    while True:
        yield from reader


def test_resuming_reads_no_row_group_of_skipped_buffers(
    mixed: PreparedDataset, tmp_path: Path
) -> None:
    """The shards of what was read before may even be gone."""
    reader = Reader(mixed, "train", batch_size=50, buffer_rows=100)
    whole = list(reader.epoch(0))
    files = list(mixed.files("train"))
    hidden = files[0].rename(tmp_path / "hidden.parquet")
    try:
        rest = list(reader.epoch(0, start=2))
    finally:
        hidden.rename(files[0])
    assert all(same(a, b) for a, b in zip(rest, whole[2:], strict=True))


def test_batches_hold_the_raw_rows(mixed: PreparedDataset) -> None:
    vocabularies = {f.name: mixed.vocabulary(f.name) for f in mixed.schema.categorical}
    for batch in Reader(mixed, "train", batch_size=64, shuffle=True, buffer_rows=200):
        assert batch.sparse.keys() == ["user", "seen_hour", "tags", "words"]
        assert batch.sparse.values().dtype == torch.int64
        assert batch.weights is not None
        columns = {
            key: np.split(jagged.values().numpy(), np.cumsum(jagged.lengths().numpy())[:-1])
            for key, jagged in batch.sparse.to_dict().items()
        }
        strengths = batch.sparse["tags"].weights().numpy()
        expected_strengths: list[float] = []
        for index, row in enumerate(map(int, batch.dense[:, 0].tolist())):
            raw = {
                "user": [row % 50],
                "seen_hour": [9],
                "tags": bag(row),
                "words": [f"w{tag % 9}" for tag in bag(row)],
            }
            for key, values in raw.items():
                assert vocabularies[key].take(columns[key][index]).to_pylist() == values
            assert batch.labels[index] == row % 2
            assert batch.weights[index] == pytest.approx(1 + row / ROWS)
            expected_strengths += [tag / 7 for tag in bag(row)]
        np.testing.assert_allclose(strengths, expected_strengths, rtol=1e-6)
        assert batch.sparse["user"].weights().tolist() == [1.0] * len(batch)


def test_order_depends_on_seed_and_epoch_only(synthetic_dataset: PreparedDataset) -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[float]:
        reader = Reader(
            synthetic_dataset,
            "train",
            batch_size=100,
            seed=seed,
            shuffle=shuffle,
            buffer_rows=3000,
        )
        return [x for batch in reader.epoch(epoch) for x in batch.dense[:, 0].tolist()]

    stored = [
        x
        for path in synthetic_dataset.files("train")
        for x in pq.read_table(path)["dense_0"].to_pylist()
    ]
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0, shuffle=False) == order(7, 5, shuffle=False) == stored
    displaced = np.array(order(0, 0)) != np.array(stored)
    assert displaced.mean() > 0.99


def test_epochs_differ_within_one_row_group(tmp_path: Path) -> None:
    dataset = prepare(Synthetic(rows=2000, cardinalities=(5,), dense=1), tmp_path / "one")
    assert pq.read_metadata(dataset.files("train")[0]).num_row_groups == 1
    reader = Reader(dataset, "train", batch_size=2000, shuffle=True)
    first, second = (next(iter(reader.epoch(epoch))).dense[:, 0] for epoch in (0, 1))
    assert (first != second).float().mean() > 0.99


def test_a_rank_with_a_stream_of_its_own_reads_no_other(
    mixed: PreparedDataset, tmp_path: Path
) -> None:
    reader = Reader(mixed, "train", batch_size=64, rank=0, world_size=2)
    whole = list(reader.epoch(0))
    last = mixed.files("train")[-1]
    hidden = last.rename(tmp_path / "hidden.parquet")
    try:
        assert all(same(a, b) for a, b in zip(reader.epoch(0), whole, strict=True))
    finally:
        hidden.rename(last)


def test_single_valued_batches_are_one_contiguous_block(
    synthetic_dataset: PreparedDataset,
) -> None:
    batch = next(iter(Reader(synthetic_dataset, "train", batch_size=32)))
    sparse = batch.sparse
    assert sparse.length_per_key() == [32] * 4
    assert sparse.offset_per_key() == [0, 32, 64, 96, 128]
    assert sparse.offsets().tolist() == list(range(129))
    assert batch.dense.shape == (32, 2)
    assert batch.dense.is_contiguous()


def test_an_abandoned_epoch_leaves_no_thread(synthetic_dataset: PreparedDataset) -> None:
    before = threading.active_count()
    batches = Reader(synthetic_dataset, "train", batch_size=10, buffer_rows=500).epoch(0)
    next(batches)
    del batches
    assert threading.active_count() == before


@pytest.fixture
def own_copy(tmp_path: Path) -> PreparedDataset:
    source = Synthetic(rows=2000, cardinalities=(5, 9), dense=1)
    return prepare(source, tmp_path / "dataset", row_group_rows=100)


@pytest.mark.parametrize("bad", [-1, 9 + 2, 2**30])
def test_a_bad_id_never_leaves_the_reader(own_copy: PreparedDataset, bad: int) -> None:
    path = own_copy.files("train")[0]
    table = pq.read_table(path)
    ids = table["field_1"].to_numpy().copy()
    ids[-1] = bad
    index = table.schema.get_field_index("field_1")
    table = table.set_column(index, "field_1", pa.array(ids))
    pq.write_table(table, path, row_group_size=100)
    reader = Reader(own_copy, "train", batch_size=50, buffer_rows=200)
    with pytest.raises(UserError, match=rf"00000\.parquet: column 'field_1' holds id {bad}, out"):
        list(reader.epoch(0))


def test_a_damaged_row_group_is_named(own_copy: PreparedDataset) -> None:
    path = own_copy.files("train")[0]
    reader = Reader(own_copy, "train", batch_size=50, buffer_rows=200)
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.parquet: cannot be read \("):
        list(reader.epoch(0))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank 2: must lie in"),
        ({"seed": -1}, "seed -1: must not be negative"),
    ],
)
def test_bad_settings(
    synthetic_dataset: PreparedDataset, setting: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Reader(synthetic_dataset, "train", **({"batch_size": 10} | setting))  # type: ignore[arg-type]
