"""Models onto TorchRec's distributed engine.

One process is a world of one: the same fused kernels, the same code path as many. This module and
`topology` are the only importers of `torchrec.distributed`.
"""

import contextlib
import datetime
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.compress.hashing import salt
from recsys_compress.compress.merge import MergedTable
from recsys_compress.config import ShardingConfig
from recsys_compress.errors import UserError
from recsys_compress.ranks import Ranks, lost_process
from recsys_compress.train.topology import plan_tables, sharder_for

_INIT_ROWS = 1 << 16  # drawn together, so that a row's first values are the same on any rank


@contextlib.contextmanager
def process_group(device: str = "cpu", timeout: int = 600) -> Iterator[Ranks]:
    """Holds the process group that sharded modules need, and yields this process.

    A process that `torchrun` started joins the others; one alone is a group of one. Within a group
    that there is already, it is that one.

    Args:
        device: "cpu" or "cuda".
        timeout: seconds to wait for another process at most.

    Raises:
        UserError: the other processes do not come, or one is lost.
    """
    if dist.is_initialized():
        with lost_process():
            yield Ranks.current()
        return
    hook = sys.excepthook  # torch puts the rank before errors, once more with every group
    on_gpu = device == "cuda" and torch.cuda.is_available()  # `build` says so where it is not
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot join the other processes: {str(error)[:200]}") from error
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # of one process; no port, no file
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        with quiet(), lost_process():
            yield Ranks.current()
            # gloo aborts a process that another one leaves in the middle of its last exchange.
            with contextlib.suppress(RuntimeError):
                dist.barrier()
    finally:
        dist.destroy_process_group()
        # Sharded modules are cycles that hold the group. Its threads must end before the
        # interpreter: one that lets go of a tensor while it ends aborts the process.
        gc.collect()
        sys.excepthook = hook


def shard(
    model: nn.Module,
    embeddings: CompressedEmbeddingBagCollection,
    device: torch.device,
    config: ShardingConfig | None = None,
    *,
    seed: int = 0,
    batch_size: int = 1024,
) -> DistributedModelParallel:
    """Places the fused tables and fuses their optimizers into the backward pass.

    Args:
        model: holds `embeddings` somewhere within.
        embeddings: may have its fused tables on the meta device; they are made here.
        device: to train on.
        config: how tables are divided among the processes.
        seed: of their first values, which do not depend on how they are divided.
        batch_size: examples a step of one process, for the planner.

    Returns:
        The model with its tables in FBGEMM's kernels; `fused_optimizer` is theirs.

    Raises:
        UserError: the tables cannot be divided so.
    """
    ranks = Ranks.current()
    path = next(name for name, module in model.named_modules() if module is embeddings)
    sharder = sharder_for(device)
    plan = {}
    if isinstance(embeddings.fused, EmbeddingBagCollection):
        for name, options in embeddings.table_options().items():
            if options.fused:
                _fuse(embeddings.get_parameter(name), options)
        plan[f"{path}.fused"] = plan_tables(
            embeddings, device, config or ShardingConfig(), ranks, batch_size
        )
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.distributed_c10d._get_default_group()),
        device=device,
        plan=ShardingPlan(plan=plan),
        sharders=[sharder],
        init_data_parallel=False,  # gradients of what is replicated are averaged by `Learner`
    )
    tables = {f"{path}.{t.parameter}": t for t in embeddings.merged_tables() if t.options.fused}
    _initialise(sharded, tables, seed)
    return sharded


class Source(Protocol):
    """What can be sliced like a tensor, like one in a safetensors file."""

    def __getitem__(self, place: tuple[slice, ...]) -> Tensor:
        """Returns the values there."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What this process has of a tensor.

    Attributes:
        place: where in the whole tensor, a slice for each dim.
        tensor: the live values.
    """

    place: tuple[slice, ...]
    tensor: Tensor


def parts(value: object) -> list[Part]:
    """Returns what this process has of a state dict's tensor: all of one that is not sharded."""
    if isinstance(value, ShardedTensor):
        return [
            Part(
                place=_place(shard.metadata.shard_offsets, shard.metadata.shard_sizes),
                tensor=shard.tensor.view(shard.metadata.shard_sizes),
            )
            for shard in value.local_shards()
            if shard.tensor.numel()
        ]
    if isinstance(value, Tensor):
        return [Part(place=tuple(slice(0, size) for size in value.shape), tensor=value)]
    return []


def row_bounds(value: object) -> list[tuple[int, int]] | None:
    """Returns first and last + 1 of the rows of each process; None where each has all of them.

    Raises:
        UserError: columns are divided.
    """
    if not isinstance(value, ShardedTensor) or Ranks.current().size == 1:
        return None
    bounds = [(0, 0)] * Ranks.current().size
    for shard in value.metadata().shards_metadata:
        offsets, sizes = shard.shard_offsets, shard.shard_sizes
        if list(sizes[1:]) != list(value.size()[1:]):
            raise UserError(
                "sharding.kind = 'column_wise': this method moves whole rows while it trains; use "
                "'row_wise' or 'table_wise'"
            )
        if sizes[0]:
            bounds[_owner(shard)] = (offsets[0], offsets[0] + sizes[0])
    return bounds


def full_tensors(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Returns a state dict's tensors whole; those that this process has all of are the live ones.

    Others are copies on the CPU, and every process has to call this with the same names.
    """
    whole = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            whole[name] = (
                value.local_shards()[0].tensor if Ranks.current().size == 1 else _gathered(value)
            )
        elif isinstance(value, Tensor):
            whole[name] = value
    return whole


@torch.no_grad()
def write(state: Mapping[str, object], values: Mapping[str, Source]) -> None:
    """Overwrites this process's part of a state dict's tensors by those of whole ones."""
    for name, value in state.items():
        for part in parts(value):
            part.tensor.copy_(values[name][part.place])


def _gathered(value: ShardedTensor) -> Tensor:
    local = {tuple(s.metadata.shard_offsets): s.tensor for s in value.local_shards()}
    like = torch.empty(0, dtype=value.dtype)
    whole = like.new_empty(value.size())
    for shard in value.metadata().shards_metadata:
        if 0 in shard.shard_sizes:
            continue
        owner = _owner(shard)
        part = local.get(tuple(shard.shard_offsets))
        if owner != Ranks.current().rank or part is None:
            part = torch.empty(shard.shard_sizes, dtype=value.dtype, device=_device(shard))
        part = part.detach().contiguous()
        dist.broadcast(part, src=owner)
        whole[_place(shard.shard_offsets, shard.shard_sizes)] = part.view(shard.shard_sizes).cpu()
    return whole


def _device(shard: object) -> torch.device:
    return shard.placement.device()  # type: ignore[attr-defined,no-any-return]


def _owner(shard: object) -> int:
    return int(shard.placement.rank())  # type: ignore[attr-defined]


def _place(offsets: list[int], sizes: list[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))


@torch.no_grad()
def _initialise(
    model: DistributedModelParallel, tables: Mapping[str, MergedTable], seed: int
) -> None:
    """Draws the first values of fused tables, each block of rows by a generator of its own."""
    state = model.state_dict() if tables else {}
    for name, table in tables.items():
        bound = table.options.init_range
        for part in parts(state[name]):
            rows, columns = part.place
            for block in range(rows.start // _INIT_ROWS, -(-rows.stop // _INIT_ROWS)):
                first = block * _INIT_ROWS
                last = min(first + _INIT_ROWS, table.num_embeddings)
                generator = torch.Generator(part.tensor.device)
                generator.manual_seed(salt(f"first values of {table.name}", block, seed))
                drawn = part.tensor.new_empty(last - first, table.stored_dim)
                drawn.uniform_(-bound, bound, generator=generator)
                begin, end = max(first, rows.start), min(last, rows.stop)
                part.tensor[begin - rows.start : end - rows.start] = drawn[
                    begin - first : end - first, columns
                ]


def _fuse(weight: nn.Parameter, options: TableOptions) -> None:
    optimizers: dict[str, type[torch.optim.Optimizer]] = {
        "rowwise_adagrad": RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
    }
    settings: dict[str, float] = {"lr": options.learning_rate}
    if options.optimizer != "sgd":
        settings["eps"] = options.epsilon
    apply_optimizer_in_backward(optimizers[options.optimizer], [weight], settings)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch and TorchRec say on first use and a user cannot act on."""
    loggers = [logging.getLogger(n) for n in ("torchrec", "torch.fx._symbolic_trace")]
    levels = [logger.level for logger in loggers]
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    with warnings.catch_warnings():
        ignore = functools.partial(warnings.filterwarnings, "ignore", category=FutureWarning)
        ignore(module=r"torchrec\.")
        ignore(message="Please use DTensor instead")
        ignore(module=r"torch\.distributed\.c10d_logger")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
