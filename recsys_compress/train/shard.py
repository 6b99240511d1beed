"""Models onto TorchRec's distributed engine; the only importer of `torchrec.distributed`.

One process is a world of one: the same fused kernels, the same code path as many.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from fbgemm_gpu.tbe.config.embedding_config import BoundsCheckMode
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import (
    ModuleSharder,
    ModuleShardingPlan,
    ShardingEnv,
    ShardingPlan,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from recsys_compress.compress import CompressedEmbeddingBagCollection, TableOptions
from recsys_compress.errors import UserError


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Holds the process group that sharded modules need, of one process.

    Raises:
        UserError: the process was started as one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("training in several processes is not supported yet; start one")
    if dist.is_initialized():
        yield
        return
    store = dist.HashStore()  # type: ignore[attr-defined]  # of one process; no port, no file
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with _quiet():
            yield
    finally:
        dist.destroy_process_group()


def shard(
    model: nn.Module, embeddings: CompressedEmbeddingBagCollection, device: torch.device
) -> DistributedModelParallel:
    """Places the fused tables and fuses their optimizers into the backward pass.

    Args:
        model: holds `embeddings` somewhere within.
        embeddings: may have its fused tables on the meta device; they are made here.
        device: to train on.

    Returns:
        The model with its tables in FBGEMM's kernels; `fused_optimizer` is theirs.
    """
    path = next(name for name, module in model.named_modules() if module is embeddings)
    plan: dict[str, ModuleShardingPlan] = {}
    sharder = cast(
        "ModuleSharder[nn.Module]",
        # Our id transform has checked already; the kernel's check would only warn.
        EmbeddingBagCollectionSharder(fused_params={"bounds_check_mode": BoundsCheckMode.NONE}),
    )
    if isinstance(embeddings.fused, EmbeddingBagCollection):
        for name, options in embeddings.table_options().items():
            if options.fused:
                _fuse(embeddings.get_parameter(name), options)
        plan[f"{path}.fused"] = construct_module_sharding_plan(
            embeddings.fused,
            {t.name: table_wise(rank=0) for t in embeddings.fused.embedding_bag_configs()},
            sharder=sharder,
            world_size=1,
            local_size=1,
            device_type=device.type,
        )
    return DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.distributed_c10d._get_default_group()),
        device=device,
        plan=ShardingPlan(plan=plan),
        sharders=[sharder],
        init_data_parallel=False,
    )


def full_tensors(state: dict[str, object]) -> dict[str, Tensor]:
    """Returns a state dict's tensors whole, without copying those that are."""
    whole = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            (local,) = value.local_shards()
            value = local.tensor
        if isinstance(value, Tensor):
            whole[name] = value
    return whole


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
def _quiet() -> Iterator[None]:
    """Silences what TorchRec says on first use and a user cannot act on."""
    loggers = [logging.getLogger(n) for n in ("torchrec", "torch.fx._symbolic_trace")]
    levels = [logger.level for logger in loggers]
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torchrec\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
