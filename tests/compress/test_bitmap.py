"""The mask of bits and its counts against Python's own counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys_compress.compress.bitmap import Bitmap, bitmap_bytes, draw, pack, popcount, unpack


def make_bitmap(length: int, ones: list[int]) -> tuple[Bitmap, torch.Tensor]:
    """Returns a mask and its (length,) bits."""
    bitmap = Bitmap(length)
    bits = torch.zeros(len(bitmap.words) * 64, dtype=torch.bool)
    bits[ones] = True
    bitmap.fill(pack(bits))
    return bitmap, bits[:length]


@st.composite
def masks(draw_: st.DrawFn) -> tuple[int, list[int]]:
    length = draw_(st.integers(1, 1500))
    seed, share = draw_(st.integers(0, 99)), draw_(st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]))
    bits = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < share
    return length, bits.nonzero().flatten().tolist()


@given(words=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_popcount_counts_ones(words: list[int]) -> None:
    expected = [(word & (2**64 - 1)).bit_count() for word in words]
    assert popcount(torch.tensor(words)).tolist() == expected


@given(words=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_bits_are_numbered_from_the_lowest(words: list[int]) -> None:
    bits = unpack(torch.tensor(words))
    assert bits.tolist() == [bool(word >> bit & 1) for word in words for bit in range(64)]
    assert pack(bits).tolist() == words


@given(mask=masks())
def test_rank_counts_the_ones_before(mask: tuple[int, list[int]]) -> None:
    bitmap, bits = make_bitmap(*mask)
    expected = [0, *bits.long().cumsum(0).tolist()]
    assert bitmap.rank(torch.arange(len(bits) + 1)).tolist() == expected
    assert bitmap.test(torch.arange(len(bits))).tolist() == bits.tolist()


@given(mask=masks(), width=st.integers(1, 64))
def test_read_returns_neighbouring_bits(mask: tuple[int, list[int]], width: int) -> None:
    bitmap, bits = make_bitmap(*mask)
    positions = torch.arange(len(bits) // width) * width
    words = bitmap.read(positions, width)
    found = words[:, None].bitwise_and(1 << torch.arange(width)).bool()
    assert torch.equal(found, bits[: len(positions) * width].view(-1, width))


def test_a_second_fill_counts_anew() -> None:
    bitmap, _ = make_bitmap(700, list(range(700)))
    memory = bitmap.words.data_ptr(), bitmap.counts.data_ptr()
    bitmap.fill(torch.zeros_like(bitmap.words))
    assert bitmap.rank(torch.tensor([700])).item() == 0
    assert memory == (bitmap.words.data_ptr(), bitmap.counts.data_ptr())


@pytest.mark.parametrize("length", [1, 63, 255, 256, 257, 100_000])
def test_counts_take_a_quarter_of_the_mask(length: int) -> None:
    bitmap = Bitmap(length)
    assert bitmap_bytes(length) == bitmap.words.nbytes + bitmap.counts.nbytes
    assert bitmap.counts.nbytes * 4 == bitmap.words.nbytes
    assert length / 8 <= bitmap.words.nbytes <= length / 8 + 32


@given(mask=masks(), data=st.data())
def test_draw_takes_so_many_zeros_between_two_bits(
    mask: tuple[int, list[int]], data: st.DataObject
) -> None:
    bitmap, bits = make_bitmap(*mask)
    first = data.draw(st.integers(0, len(bits)))
    last = data.draw(st.integers(first, len(bits)))
    zeros = int((~bits[first:last]).sum())
    count = data.draw(st.integers(0, zeros))
    words = draw(bitmap.words, first, last, count, torch.Generator().manual_seed(0))
    drawn = unpack(words)
    assert drawn.sum() == count == drawn[first:last].sum()
    assert not (drawn[: len(bits)] & bits).any()


def test_draw_is_uniform_and_seeded() -> None:
    """Each of 60 zeros is drawn in a third of 3,000 masks, within 4.5 standard deviations."""
    bitmap, bits = make_bitmap(100, list(range(10, 50)))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(100)
    for _ in range(3000):
        total += unpack(draw(bitmap.words, 0, 100, 20, generator))[:100]
    deviation = (total[~bits] - 1000) / (3000 * (1 / 3) * (2 / 3)) ** 0.5
    assert deviation.abs().max() < 4.5
    again = [draw(bitmap.words, 0, 100, 20, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)


def test_draw_over_several_chunks() -> None:
    length = 3_000_001
    words = draw(Bitmap(length).words, 0, length, 123_457, torch.Generator().manual_seed(0))
    drawn = unpack(words)
    assert drawn.sum() == 123_457
    thirds = torch.stack([part.sum() for part in drawn[:length].split(1_000_001)]).float()
    assert (thirds / 123_457 - 1 / 3).abs().max() < 0.006
