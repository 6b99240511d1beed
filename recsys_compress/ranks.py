"""The processes that work on one job together, and what they tell each other.

A process alone is a group of one: the same calls, which then cost nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recsys_compress.errors import UserError

T = TypeVar("T")
# What the messages of broken connections have in them.
_CONNECTION = ("gloo", "nccl", "NCCL", "TCPStore", "onnection")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of its group.

    All methods are collective: every process of the group has to call them, in the same order.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "Ranks":
        """Returns this process in the default group, or alone where there is none."""
        if not dist.is_initialized():
            return Ranks()
        return Ranks(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def mean_(self, tensor: Tensor) -> Tensor:
        """Overwrites a tensor, of one shape everywhere, by its mean over the processes."""
        return self.sum_(tensor).div_(self.size) if self.size > 1 else tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Overwrites a tensor, of one shape everywhere, by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def concat(self, tensor: Tensor) -> Tensor:
        """Returns the (N, ...) tensors of all processes one below the other; N may differ."""
        if self.size == 1:
            return tensor
        length = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        counts = [int(count) for count in lengths]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Sends rows to each process and returns those that come, by the process they come from.

        Args:
            rows: (sum of `sent`, ...) those for the first process first.
            sent: number of rows for each process.
            received: number of rows from each process.
        """
        if self.size == 1:
            return rows
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent))
        return out

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes; plain data."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """Returns the first process's value; plain data."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Waits for all at the end, and fails in all if it fails in one.

        What lies within must have no collective that one process may leave out.

        Raises:
            UserError: another process failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        found = self.gather(None if failure is None else " ".join(str(failure).split()))
        if failure is not None:
            raise failure
        for rank, message in enumerate(found):
            if message is not None:
                raise UserError(f"process {rank}: {message}")


@contextlib.contextmanager
def lost_process() -> Iterator[None]:
    """Turns the loss of another process, which shows as a broken connection, into one line.

    Raises:
        UserError: a connection broke or waited too long.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if Ranks.current().size == 1 or not any(word in text for word in _CONNECTION):
            raise
        raise UserError(
            f"another process is gone, and says itself why ({text[:120]}); mend that, then go on "
            "with recsys-compress train --resume RUN_FOLDER"
        ) from error
