"""What a plan takes of each process: its fused tables divided as the trainer divides them."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from recsys_compress.byte_sizes import parse_bytes
from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.config import Job, ShardingConfig
from recsys_compress.errors import UserError
from recsys_compress.plan.candidates import Sizes
from recsys_compress.train.topology import plan_for, rank_memory, table_shards

_STEPS = 12  # of the search for a budget that fits, each a plan and a dry run


@dataclass(frozen=True, kw_only=True)
class FullestRank:
    """The process that holds most, in training.

    Attributes:
        world_size: number of processes.
        parameters: bytes, of its parts of divided tables and of all that is replicated.
        optimizer: bytes, of the state for the same.
        memory: bytes that a process has.
    """

    world_size: int
    parameters: int
    optimizer: int
    memory: int

    @property
    def training(self) -> int:
        """Bytes in training."""
        return self.parameters + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes that train a plan.

    Attributes:
        world_size: number of processes.
        device: that they train on; it need not be here.
        sharding: how tables are divided, and the memory.
        batch_size: examples a step of all processes.
    """

    world_size: int
    device: torch.device
    sharding: ShardingConfig
    batch_size: int

    @staticmethod
    def of(job: Job, world_size: int, hbm: str | None) -> "Cluster":
        """Returns the processes of a job.

        Args:
            job: with its sharding.
            world_size: number of processes.
            hbm: memory of each GPU, where they are to train on GPUs; None for what the job says.

        Raises:
            UserError: `hbm` is no size.
        """
        sharding, device = job.sharding, job.train.device
        if hbm is not None:
            sharding = dataclasses.replace(sharding, device_memory=parse_bytes(hbm))
            device = "cuda"
        return Cluster(
            world_size=world_size,
            device=torch.device(device),
            sharding=sharding,
            batch_size=job.train.batch_size,
        )

    def fullest(self, collection: CompressedEmbeddingBagCollection, sizes: Sizes) -> FullestRank:
        """Returns the process that holds most of a plan's tables.

        Args:
            collection: the tables, on the meta device.
            sizes: of them all.

        Raises:
            UserError: they cannot be divided so, or do not fit.
        """
        plan = plan_for(
            collection,
            self.device,
            self.sharding,
            world_size=self.world_size,
            batch_size=-(-self.batch_size // self.world_size),
        )
        parts = [shard for shard in table_shards(collection, plan) if shard.rank >= 0]
        held: Counter[int] = Counter()
        for part in parts:
            held[part.rank] += part.parameter_bytes + part.optimizer_bytes
        most = max(held, key=lambda rank: held[rank], default=0)
        # What is not divided, like tables of dense optimizers and maps of ids, each process has.
        found = FullestRank(
            world_size=self.world_size,
            parameters=sizes.parameters
            - sum(part.parameter_bytes for part in parts if part.rank != most),
            optimizer=sizes.optimizer
            - sum(part.optimizer_bytes for part in parts if part.rank != most),
            memory=rank_memory(self.sharding, self.device, self.world_size),
        )
        if found.training > found.memory:
            raise UserError(
                f"the fullest of {self.world_size} processes would hold {found.training:,} bytes "
                f"of tables and optimizer state, and has {found.memory:,}"
            )
        return found


def largest_that_fits(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """Returns a budget that fits, close to the largest, by bisection of its logarithm.

    Args:
        fits: whether the plan of a budget does.
        least: bytes of the smallest plan.
        most: a budget whose plan does not fit.

    Returns:
        None where not even the smallest plan fits.
    """
    if not fits(least):
        return None
    for _ in range(_STEPS):
        middle = int((least * most) ** 0.5)
        if middle <= least:
            break
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
