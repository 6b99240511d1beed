from collections import Counter as Multiset

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_compress.data import encode
from recsys_compress.data.encode import Counter, HashEncoder, VocabularyEncoder
from recsys_compress.data.schema import MISSING_ID, UNKNOWN_ID

Values = list[int | None] | list[str | None]

values_of_one_type = st.one_of(
    st.lists(st.none() | st.integers(-5, 30)), st.lists(st.none() | st.text("abå", max_size=3))
)


def arrow(values: Values) -> pa.Array:
    strings = any(isinstance(value, str) for value in values)
    return pa.array(values, pa.large_string() if strings else pa.int64())


@given(values_of_one_type, st.integers(1, 3))
def test_vocabulary_round_trip(values: Values, min_count: int) -> None:
    encoder = VocabularyEncoder(min_count)
    encoder.count(arrow(values))
    table = encoder.freeze()
    ids = encoder.encode(arrow(values))
    decoded = [table["value"][int(id_)].as_py() for id_ in ids]
    counts = Multiset(values)
    for value, id_, back in zip(values, ids, decoded, strict=True):
        if value is None:
            assert id_ == MISSING_ID
        elif counts[value] < min_count:
            assert id_ == UNKNOWN_ID
        else:
            assert back == value
    assert table["count"].to_pylist() == np.bincount(ids, minlength=len(table)).tolist()
    assert table["id"].to_pylist() == list(range(encoder.num_embeddings))


def test_ids_rank_by_frequency_and_ties_by_value() -> None:
    encoder = VocabularyEncoder(min_count=1)
    encoder.count(arrow(["b", "c", "a", "c"]))
    assert encoder.freeze()["value"].to_pylist() == [None, None, "c", "a", "b"]


@pytest.mark.parametrize("values", [[1, 2], ["x", "y"]])
def test_values_not_counted_are_unknown(values: Values) -> None:
    encoder = VocabularyEncoder(min_count=1)
    encoder.freeze()
    assert encoder.encode(arrow([*values, None])).tolist() == [UNKNOWN_ID, UNKNOWN_ID, MISSING_ID]


@pytest.mark.parametrize("text", [False, True])
def test_a_large_vocabulary_finds_all_its_values_and_no_others(*, text: bool) -> None:
    numbers = np.random.default_rng(0).permutation(20_000) * 7919 - 10**7
    values = [str(n) for n in numbers] if text else numbers.tolist()
    known, absent = values[:15_000], values[15_000:]
    encoder = VocabularyEncoder.of(arrow(known))
    found = encoder.encode(arrow([*known, None, *absent])[10:])  # a slice, as batches are
    expected = [*range(12, 15_002), MISSING_ID, *[UNKNOWN_ID] * 5_000]
    assert found.tolist() == expected


def test_values_that_share_a_hash_keep_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real collision of 64-bit hashes cannot be had; a hash of the length alone has many."""
    monkeypatch.setattr(
        encode,
        "hash_values",
        lambda values: np.array([len(value) for value in values.to_pylist()], dtype=np.uint64),
    )
    encoder = VocabularyEncoder(min_count=1)
    values = ["aa", "bb", "cc", "d", "eee"]
    encoder.count(arrow(values))
    vocabulary = encoder.freeze()["value"].to_pylist()
    ids = encoder.encode(arrow([*values, "zz"]))
    assert [vocabulary[id_] for id_ in ids] == [*values, None]


@given(values_of_one_type)
def test_hash_ids_are_stable_and_counted(values: Values) -> None:
    encoder = HashEncoder()
    encoder.count(arrow(values))
    table = encoder.freeze()
    ids = HashEncoder().encode(arrow(values))
    assert Multiset(ids.tolist()) == {
        id_: count
        for id_, count in zip(table["id"].to_pylist(), table["count"].to_pylist(), strict=True)
        if count
    }
    assert ((ids == MISSING_ID) == [value is None for value in values]).all()


@given(st.lists(st.lists(st.integers(0, 9)), max_size=6))
def test_counts_do_not_depend_on_compaction(chunks: list[list[int]]) -> None:
    counter, compacting = Counter(), Counter()
    for chunk in chunks:
        counter.add(pa.array(chunk, pa.int64()))
        compacting.add(pa.array(chunk, pa.int64()))
        compacting._compact()
    assert counter.result() == compacting.result()
