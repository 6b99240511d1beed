"""Stable 64-bit hashes of raw values, and random numbers that depend on a counter alone.

Version 1. With `mix` the SplitMix64 step (Steele et al., OOPSLA 2014), an integer `v` hashes to
`mix(v)` (two's complement), and a string to `h` after `h = mix(length in bytes)` and, for each
word of eight UTF-8 bytes (little-endian, the last one padded with zeros), `h = mix(h ^ word)`.
Prepared datasets and deployed models rely on these numbers: a change is a new `HASH_VERSION`.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_compress.data.schema import HASH_NUM_EMBEDDINGS, NUM_RESERVED_IDS

HASH_VERSION = 1

UInt64s = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(x: UInt64s) -> UInt64s:
    """Returns the SplitMix64 step of each number: a bijection of 64 bits."""
    z = x + _GAMMA
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def random_bits(key: int, counter: UInt64s) -> UInt64s:
    """Returns 64 random bits per counter; streams of different keys are independent."""
    return mix(counter ^ mix(np.array([key % 2**64], dtype=np.uint64)))


def uniform(key: int, counter: UInt64s) -> npt.NDArray[np.float64]:
    """Returns one number in [0, 1) per counter; streams of different keys are independent."""
    bits = random_bits(key, counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_values(values: pa.Array) -> UInt64s:
    """Returns the hash of each value of an int64 or large_string array without nulls."""
    if pa.types.is_large_string(values.type):
        return _hash_strings(values)
    return mix(values.to_numpy(zero_copy_only=True).view(np.uint64))


def fold(hashes: UInt64s) -> npt.NDArray[np.int64]:
    """Returns hashes as ids in [2, 2**62)."""
    size = np.uint64(HASH_NUM_EMBEDDINGS - NUM_RESERVED_IDS)
    return (hashes % size + np.uint64(NUM_RESERVED_IDS)).view(np.int64)


def _hash_strings(values: pa.Array) -> UInt64s:
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int64)
    offsets = offsets[values.offset : values.offset + len(values) + 1]
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    words = _words(values, int(offsets[0]), int(offsets[-1]))
    hashes = mix(lengths.astype(np.uint64))
    for position in range(0, int(lengths.max(initial=0)), 8):
        rows = np.flatnonzero(lengths > position)
        used = np.minimum(lengths[rows] - position, 8).astype(np.uint64)
        padding = (np.uint64(8) - used) * np.uint64(8)
        word = words[starts[rows] + position] << padding >> padding
        hashes[rows] = mix(hashes[rows] ^ word)
    return hashes


def _words(values: pa.Array, start: int, end: int) -> UInt64s:
    """Returns the eight bytes from each byte position on, as one number per position."""
    padded = np.zeros(end - start + 8, dtype=np.uint8)
    if end > start:
        padded[:-8] = np.frombuffer(values.buffers()[2], dtype=np.uint8)[start:end]
    return np.ndarray(shape=(end - start + 1,), dtype="<u8", buffer=padded, strides=(1,))
