"""Vectorised 64-bit hashing of ids, and constants laid out along the values of a batch."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # of splitmix64, as signed 64-bit


def salt(feature: str, probe: int, seed: int) -> int:
    """Returns the signed 64-bit salt of one feature's probe; the same on every machine."""
    text = f"{seed}/{probe}/{feature}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def mix(ids: Tensor) -> Tensor:
    """Scrambles int64 values in place by the finaliser of splitmix64, a bijection of 64 bits.

    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    for shift, multiplier in ((30, _MULTIPLIERS[0]), (27, _MULTIPLIERS[1])):
        ids.bitwise_xor_(_shift_right(ids, shift)).mul_(multiplier)
    return ids.bitwise_xor_(_shift_right(ids, 31))


def to_range(hashes: Tensor, size: Tensor | int) -> Tensor:
    """Maps 64-bit hashes to [0, size) by multiplication, which costs less than a remainder.

    Args:
        hashes: int64, used up in place.
        size: at most 2**31, so that the product of it and the hash's upper 32 bits fits.

    Source: Lemire, "Fast Random Integer Generation in an Interval", 2019.
    """
    hashes.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF)
    return hashes.mul_(size).bitwise_right_shift_(32)


def per_value(constants: Sequence[int], length_per_key: list[int], device: torch.device) -> Tensor:
    """Returns each key's constant, repeated for each of its values.

    Args:
        constants: (K,) integers.
        length_per_key: (K,) number of values of each key.
        device: of the result.

    Returns:
        (sum of `length_per_key`,) int64.
    """
    table = constant_tensor(tuple(constants), device)
    lengths = constant_tensor(tuple(length_per_key), device)
    return torch.repeat_interleave(table, lengths, output_size=sum(length_per_key))


def along_keys(
    values: Tensor, constants: Sequence[int], length_per_key: list[int]
) -> tuple[Tensor, Tensor]:
    """Returns values and the constants of their keys in shapes that broadcast.

    Keys of equal length, as with one id per feature, need no copy of a constant for each value, and
    neither do equal constants.

    Args:
        values: (N,) integers, keys outermost.
        constants: (K,) integers.
        length_per_key: (K,) number of values of each key.

    Returns:
        Shapes (K, N / K) and (K, 1) where all keys have equally many values, (1, N) and (1, 1)
        where all constants are equal, else (1, N) twice.
    """
    if len(set(length_per_key)) == 1 and length_per_key[0] > 0:
        column = constant_tensor(tuple(constants), values.device).unsqueeze(1)
        return values.view(len(constants), -1), column
    if len(set(constants)) == 1:
        return values.unsqueeze(0), constant_tensor((constants[0],), values.device).unsqueeze(1)
    flat = per_value(constants, length_per_key, values.device)
    return values.unsqueeze(0), flat.unsqueeze(0)


def check_range(
    values: Tensor, limits: Sequence[int], length_per_key: list[int], features: Sequence[str]
) -> None:
    """Refuses ids outside their table. A kernel would read and train row 0 instead.

    Args:
        values: (N,) integers, keys outermost.
        limits: (K,) rows of each key's table.
        length_per_key: (K,) number of values of each key.
        features: (K,) what the error calls each key.

    Raises:
        ValueError: names the first such id.
    """
    ids, rows = along_keys(values, limits, length_per_key)
    # Where a row of ids has one limit, its least and greatest say it all, in a single pass.
    by_key = rows.shape[1] == 1 and ids.shape[1] > 0
    low, high = ids.aminmax(dim=1, keepdim=True) if by_key else (ids, ids)
    inside = (low >= 0).logical_and_(high < rows)
    if values.device.type != "cpu":
        torch._assert_async(inside.all(), "an id lies outside its embedding table")
    elif not inside.all():
        outside = (ids < 0).logical_or_(ids >= rows).view(-1)
        position = int(outside.nonzero()[0])
        ends = torch.tensor(length_per_key).cumsum(0)
        key = int(torch.searchsorted(ends, position, right=True))
        raise ValueError(
            f"feature {features[key]!r}: id {int(values[position])} lies outside "
            f"[0, {limits[key]}); prepare the data again, or give the table more rows"
        )


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where a look-up finds its rows.

    Attributes:
        rows: number of rows, at most 2**31, that ids are hashed to.
        tail: the first of them.
        head: ids below it have a row of their own instead.
        start: that of id 0.
    """

    rows: int
    tail: int = 0
    head: int = 0
    start: int = 0


class SaltedHash(nn.Module):
    """Maps each value of each feature to a row for each of the feature's probes.

    Args:
        source: (K,) position of each look-up's feature.
        salts: (K,) of the look-ups.
        regions: (K,) where each look-up finds its rows.
        names: (K,) of the look-ups.
    """

    def __init__(
        self,
        *,
        source: Sequence[int],
        salts: Sequence[int],
        regions: Sequence[Region],
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self.source = list(source)
        self.salts = tuple(salts)
        self.names = list(names)
        self.rows = tuple(region.rows for region in regions)
        self.tails = tuple(region.tail for region in regions)
        self.heads = tuple(region.head for region in regions)
        self.starts = tuple(region.start for region in regions)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Returns the K look-ups' bags with values that are rows of their tables."""
        repeated = repeat(features, self.source)
        lengths = repeated.length_per_key()
        ids, salts = along_keys(repeated.values(), self.salts, lengths)
        _, rows = along_keys(repeated.values(), self.rows, lengths)
        found = to_range(mix(ids + salts), rows)
        if any(self.heads):
            _, heads = along_keys(repeated.values(), self.heads, lengths)
            _, starts = along_keys(repeated.values(), self.starts, lengths)
            _, tails = along_keys(repeated.values(), self.tails, lengths)
            # Below 0 there are none of its own: that row would be another table's.
            own = (ids < heads).logical_and_(ids >= 0)
            found = torch.where(own, ids + starts, found + tails)
        return KeyedJaggedTensor(
            keys=self.names,
            values=found.view(-1),
            weights=repeated.weights_or_none(),
            lengths=repeated.lengths(),
            stride=features.stride(),
            length_per_key=lengths,
        )


def repeat(features: KeyedJaggedTensor, source: Sequence[int]) -> KeyedJaggedTensor:
    """Returns the keys at some positions, each as often as it is named.

    Where all keys have equally many values they are copied as rows of a matrix, in less than half
    the time that torchrec's permutation takes.
    """
    lengths = features.length_per_key()
    if len(set(lengths)) != 1 or features.weights_or_none() is not None:
        return features.permute(list(source))
    keys, order = features.keys(), constant_tensor(tuple(source), features.device())
    rows = (t.view(len(keys), -1) for t in (features.values(), features.lengths()))
    values, bags = (t.index_select(0, order).view(-1) for t in rows)
    return KeyedJaggedTensor(
        keys=[keys[position] for position in source],
        values=values,
        lengths=bags,
        stride=features.stride(),
        length_per_key=[lengths[0]] * len(source),
    )


@functools.lru_cache(maxsize=256)
def constant_tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns integers as an int64 tensor, made once; not to be changed."""
    # Not buffers: sharding zero-fills buffers that were made on the meta device.
    with torch.inference_mode(False):  # a model that only predicts may ask first, training later
        return torch.tensor(values, dtype=torch.int64, device=device)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Returns a logical (zero-filling) right shift."""
    return values.bitwise_right_shift(bits).bitwise_and_((1 << (64 - bits)) - 1)
