import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from recsys_compress.data.hashing import fold, hash_values, mix, uniform

WORD = 2**64


def mix_one(x: int) -> int:
    """SplitMix64 as published, on Python's integers."""
    z = (x + 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def hash_one(text: str) -> int:
    data = text.encode()
    h = mix_one(len(data))
    for start in range(0, len(data), 8):
        h = mix_one(h ^ int.from_bytes(data[start : start + 8], "little"))
    return h


def test_mix_is_the_published_generator() -> None:
    """First outputs of SplitMix64 seeded with 1234567, from its reference implementation."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + gamma * step) % WORD for step in range(3)], dtype=np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(states).tolist() == expected


@given(st.lists(st.text(max_size=40)), st.integers(0, 5))
def test_strings_hash_as_documented(texts: list[str], start: int) -> None:
    array = pa.array(texts, pa.large_string()).slice(start)
    assert hash_values(array).tolist() == [hash_one(text) for text in texts[start:]]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers_hash_as_documented(numbers: list[int]) -> None:
    hashes = hash_values(pa.array(numbers, pa.int64()))
    assert hashes.tolist() == [mix_one(number % WORD) for number in numbers]


@given(st.lists(st.integers(0, WORD - 1), min_size=1))
def test_folded_ids_leave_the_reserved_ones_free(hashes: list[int]) -> None:
    ids = fold(np.array(hashes, dtype=np.uint64))
    assert ids.min() >= 2
    assert ids.max() < 2**62


def test_uniform_numbers_are_uniform_and_streams_differ() -> None:
    counter = np.arange(100_000, dtype=np.uint64)
    first, second = uniform(1, counter), uniform(2, counter)
    deciles = np.bincount((first * 10).astype(int), minlength=10)
    assert np.abs(deciles - 10_000).max() < 400  # four standard deviations
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
