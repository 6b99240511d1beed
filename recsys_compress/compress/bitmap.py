"""A bit mask that counts the ones before any position at once: which blocks are stored, and where.

The counts follow rank9 (Vigna, "Broadword Implementation of Rank/Select Queries", WEA 2008): for
every 256 bits one int64 word holds the number of ones before them in its upper 32 bits and, in its
lower 32, those of its own first 0, 1, 2 and 3 words in 8 bits each. So a query reads two words and
counts the ones of a third of a cache line's worth of bits, and counts take a quarter of the mask.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

MAX_ONES = 2**31 - 1
_WORDS = 4  # of 64 bits that one entry of the counts covers
_CHUNK = 1 << 14  # words unpacked at a time: a MiB of booleans


def bitmap_bytes(length: int) -> int:
    """Returns the bytes of a mask of so many bits and its counts."""
    return _entries(length) * (_WORDS + 1) * 8


class Bitmap(nn.Module):
    """A mask of bits with counts.

    Its buffers are `words` (W,) int64, bit i of the mask being bit i % 64 of word i // 64, and
    `counts` (W / 4,) int64.

    Args:
        length: number of bits; all are zero at first.
    """

    words: Tensor
    counts: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        entries = _entries(length)
        self.register_buffer("words", torch.zeros(entries * _WORDS, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(entries, dtype=torch.int64))

    def fill(self, words: Tensor) -> None:
        """Overwrites the mask in place, and counts anew."""
        self.words.copy_(words)
        total = 0
        for part in chunks(self.words):
            ones = popcount(self.words[part]).view(-1, _WORDS)
            sums = ones.sum(1).cumsum_(0)
            entries = (sums - ones.sum(1) + total) << 32
            for word in range(1, _WORDS):
                entries |= ones[:, :word].sum(1) << (8 * word)
            self.counts[part.start // _WORDS : part.stop // _WORDS] = entries
            total += int(sums[-1])
        if total > MAX_ONES:
            raise ValueError(f"{total} ones are more than {MAX_ONES}")

    def read(self, positions: Tensor, width: int) -> Tensor:
        """Returns words whose lowest `width` bits are those from each position on.

        Args:
            positions: int64.
            width: at most 64; the bits above are undefined.
        """
        shifts = positions & 63
        low = _at(self.words, positions >> 6) >> shifts
        if width == 1 or 64 % width == 0:  # positions are taken to be multiples of it
            return low
        high = _at(self.words, (positions + (width - 1)) >> 6)
        low &= (1 << (63 - shifts) << 1) - 1  # undoes the sign's
        return low | (high << 1 << (63 - shifts))

    def test(self, positions: Tensor) -> Tensor:
        """Returns whether the bits at int64 positions are set."""
        return (self.read(positions, 1) & 1).bool()

    def rank(self, positions: Tensor) -> Tensor:
        """Returns the number of ones before each int64 position, from 0 to the mask's length."""
        word = positions >> 6
        below = (1 << (positions & 63)) - 1
        below &= _at(self.words, word)
        counts = _at(self.counts, word >> 2)
        within = counts >> ((word & 3) << 3)
        return popcount(below).add_(within.bitwise_and_(255)).add_(counts >> 32)


def popcount(words: Tensor) -> Tensor:
    """Returns the number of ones of int64 words, by adding neighbouring fields in parallel."""
    # The sign that a signed shift drags in is masked off by each of these constants.
    pairs = words - (words >> 1).bitwise_and_(0x5555555555555555)
    fours = ((pairs >> 2).bitwise_and_(0x3333333333333333)).add_(
        pairs.bitwise_and_(0x3333333333333333)
    )
    bytes_ = (fours >> 4).add_(fours).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return bytes_.mul_(0x0101010101010101).bitwise_right_shift_(56)


def unpack(words: Tensor) -> Tensor:
    """Returns the bits of int64 words, (64 W,) bool on the CPU."""
    packed = words.cpu().view(torch.uint8).numpy()
    return torch.from_numpy(np.unpackbits(packed, bitorder="little")).view(torch.bool)


def pack(bits: Tensor) -> Tensor:
    """Returns the int64 words of (64 W,) bool on the CPU."""
    packed = np.packbits(bits.numpy(), bitorder="little")
    return torch.from_numpy(packed).view(torch.int64)


def chunks(words: Tensor) -> Iterator[slice]:
    """Yields slices of words few enough to be unpacked at once."""
    for first in range(0, len(words), _CHUNK):
        yield slice(first, min(first + _CHUNK, len(words)))


def draw(words: Tensor, first: int, last: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns a mask of `count` bits drawn uniformly from the zeros of another between two bits.

    Each zero is drawn by itself with the same chance, and then as many as are too few or too many
    are drawn one by one: memory for a chunk of bits is enough, and all sets are equally likely.

    Args:
        words: (W,) int64, the other mask.
        first: of the bits to draw from.
        last: the bit behind them.
        count: at most their zeros.
        generator: on the CPU.
    """
    words = words.cpu()
    zeros = sum(int(_free(words, part, first, last).sum()) for part in chunks(words))
    drawn, missing = torch.zeros_like(words), count
    for part in chunks(words):
        free = _free(words, part, first, last)
        free &= torch.rand(len(free), generator=generator) < count / max(zeros, 1)
        drawn[part] = pack(free)
        missing -= int(free.sum())

    def accept(at: Tensor) -> Tensor:
        word = at >> 6
        set_ = drawn[word] if missing < 0 else ~(drawn[word] | words[word])
        return (set_ >> (at & 63) & 1).bool()

    available = count - missing if missing < 0 else zeros - count + missing
    found = _distinct(
        lambda n: torch.randint(first, last, (n,), generator=generator),
        accept,
        abs(missing),
        max(available, 1) / max(last - first, 1),
        generator,
    )
    bits = 1 << (found & 63)
    return drawn.index_add_(0, found >> 6, bits if missing > 0 else -bits)


def _distinct(
    propose: Callable[[int], Tensor],
    accept: Callable[[Tensor], Tensor],
    count: int,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Returns `count` distinct accepted proposals, of which about `share` are accepted."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        proposed = propose(min(int((count - len(found)) / share) + 64, 1 << 22))
        found = torch.unique(torch.cat([found, proposed[accept(proposed)]]))
    return found[torch.randperm(len(found), generator=generator)[:count]]


def _free(words: Tensor, part: slice, first: int, last: int) -> Tensor:
    """Returns a part's bits that are zero and between two bits."""
    free = unpack(~words[part])
    start = part.start * 64
    free[: max(0, first - start)] = False
    free[max(0, last - start) :] = False
    return free


def _entries(length: int) -> int:
    """Returns how many counts there are: enough for a query behind the last bit, too."""
    return length // (64 * _WORDS) + 1


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Returns values[index]; of a flat index this is several times faster."""
    return values.index_select(0, index.reshape(-1)).view(index.shape)
