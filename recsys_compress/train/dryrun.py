"""What a training job would take on a cluster that is not here: bytes in memory and on the wire.

Nothing is trained and no row of data is read: tables stay on the meta device, and which rows of
them a batch looks up is drawn from the id counts that a prepared dataset comes with. `RankBytes`
says what each figure counts and leaves out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.policy import resolve
from recsys_compress.compress.size import CombineSize
from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.hashing import uniform
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.train.build import EMBEDDINGS, logical_tables, lowered
from recsys_compress.train.meter import Penalty
from recsys_compress.train.shard import quiet
from recsys_compress.train.topology import TableShard, plan_for, rank_memory, table_shards
from recsys_compress.train.traffic import GRADIENTS, Exchange, Traffic

_SAMPLE = 1 << 15  # examples drawn


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """One process while it trains.

    Attributes:
        rank: its number.
        parameters: of its parts of the tables, of all else in the model, and of buffers.
        optimizer: of the optimizers' state for them. Not of parameters that a method trains itself.
        gradients: of what is replicated; tables have none, they are updated in the backward pass.
        activations: distinct storages that a step saves for its backward pass, parameters left
            out. Not what comes and goes within the forward or the backward pass.
        exchanges: by "ids" (what is looked up, with lengths and their announcement), "vectors
            forward" and "vectors backward" (pooled, and their gradients) and "gradients" (of what
            is replicated; loss and two flags go with them). Not what a method's hook tells other
            processes every so many steps, nor evaluation and checkpoints.
    """

    rank: int
    parameters: int
    optimizer: int
    gradients: int
    activations: int
    exchanges: Mapping[str, Exchange]

    @property
    def buffers(self) -> int:
        """Bytes of all tensors that go into collectives or come out, as if none was freed."""
        found = self.exchanges.values()
        in_place = self.exchanges[GRADIENTS].received
        return sum(e.sent + e.received for e in found) - in_place

    @property
    def total(self) -> int:
        """All of these; not the libraries, the reader, and what an allocator holds back."""
        held = self.parameters + self.optimizer + self.gradients
        return held + self.activations + self.buffers

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {**dataclasses.asdict(self), "buffers": self.buffers, "total": self.total}


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The plan of a job for a number of processes.

    Attributes:
        device: "cpu" or "cuda".
        batch_size: examples of a step in one process.
        memory: bytes that one process has; None where nothing says so.
        shards: the parts of the tables.
        ranks: the processes.
    """

    device: str
    batch_size: int
    memory: int | None
    shards: Sequence[TableShard]
    ranks: Sequence[RankBytes]

    @property
    def fullest(self) -> RankBytes:
        """The process with the most bytes."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def emptiest(self) -> RankBytes:
        """The process with the fewest bytes."""
        return min(self.ranks, key=lambda rank: rank.total)

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {
            "world_size": len(self.ranks),
            "device": self.device,
            "batch_size": self.batch_size,
            "memory": self.memory,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "ranks": [rank.to_json() for rank in self.ranks],
        }


@quiet()
def dry_run(job: Job, world_size: int) -> DryRun:
    """Returns what the first phase of a job would take; of phases that search it is the largest.

    Args:
        job: the job; its device need not be here.
        world_size: number of processes.

    Raises:
        UserError: the job does not suit the data, or does not fit the memory it is given.
    """
    dataset = PreparedDataset.open(job.data.path)
    tables = logical_tables(dataset.schema, job.embedding.dim)
    policy = resolve(job.embedding, tables).phases()[0].policy
    embeddings = lowered(job, dataset.schema, policy, torch.device("cpu"))
    model = build_model(job.model, embeddings, len(dataset.schema.dense))
    batch_size = -(-job.train.batch_size // world_size)
    device = torch.device(job.train.device)
    memory = None
    if device.type == "cuda" or job.sharding.host_memory is not None:
        memory = rank_memory(job.sharding, device, world_size)
        _check_sum(embeddings, memory, world_size)
    plan: Mapping[str, Any] = {}
    if embeddings.fused is not None:
        plan = plan_for(
            embeddings,
            device,
            job.sharding,
            world_size=world_size,
            batch_size=batch_size,
        )
    shards = table_shards(embeddings, plan)
    lookups = embeddings.ids(_sample(dataset))
    traffic = Traffic.of(embeddings, shards, lookups, world_size)
    local = _resized(lookups, batch_size)
    replicated = _replicated(model, embeddings, job)
    saved = _saved_by_model(model, embeddings, job, dataset, local)
    ranks = []
    for rank in range(world_size):
        own = [s for s in shards if s.rank == rank]
        exchanges = traffic.exchanges(rank, batch_size, replicated.gradients)
        ranks.append(
            RankBytes(
                rank=rank,
                parameters=replicated.parameters + sum(s.parameter_bytes for s in own),
                optimizer=replicated.optimizer + sum(s.optimizer_bytes for s in own),
                gradients=replicated.gradients,
                activations=saved + traffic.saved(rank, batch_size),
                exchanges=exchanges,
            )
        )
    found = DryRun(
        device=job.train.device, batch_size=batch_size, memory=memory, shards=shards, ranks=ranks
    )
    if memory is not None and found.fullest.total > memory:
        missing = found.fullest.total - memory
        raise UserError(
            f"sharding: process {found.fullest.rank} of {world_size} needs "
            f"{found.fullest.total:,} bytes and has {memory:,}: {missing:,} are missing; compress "
            "more, or give more processes or memory"
        )
    return found


class SavedBytes(saved_tensors_hooks):
    """Counts the bytes of distinct storages that are saved for a backward pass, within a `with`.

    Args:
        known: tensors whose storages do not count, like parameters.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        # Storages are kept, so that none takes the place of another.
        self._known = {_key(t): t.untyped_storage() for t in known}
        self._saved: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Their bytes."""
        return sum(storage.nbytes() for storage in self._saved.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._known:
            self._saved[_key(tensor)] = tensor.untyped_storage()
        return tensor


def _key(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.is_meta else storage.data_ptr()


@dataclass(frozen=True, kw_only=True)
class _Replicated:
    """Bytes of what every process has."""

    parameters: int
    optimizer: int
    gradients: int


def _replicated(
    model: nn.Module, embeddings: CompressedEmbeddingBagCollection, job: Job
) -> _Replicated:
    options = embeddings.table_options()
    fused = {f"{EMBEDDINGS}{name}" for name, option in options.items() if option.fused}
    held = {id(p) for hook in embeddings.hooks() for p in hook.parameters}
    optimizer = gradients = 0
    for name, parameter in model.named_parameters():
        if name in fused or id(parameter) in held:
            continue
        gradients += parameter.numel() * parameter.element_size()
        inner = name.removeprefix(EMBEDDINGS)
        if inner in options:
            rows, columns = parameter.shape
            optimizer += options[inner].state_bytes(rows, columns)
        else:
            size = CombineSize.of(name, parameter.numel(), job.train.optimizer)
            optimizer += size.optimizer_bytes
    state = {n: t for n, t in model.state_dict().items() if n not in fused}
    return _Replicated(
        parameters=sum(t.numel() * t.element_size() for t in state.values()),
        optimizer=optimizer,
        gradients=gradients,
    )


def _sample(dataset: PreparedDataset) -> KeyedJaggedTensor:
    """Draws features of examples by the frequencies of ids in the training split."""
    fields = dataset.schema.categorical
    rows = max(dataset.rows("train"), 1)
    values, lengths = [], []
    for number, field in enumerate(fields):
        ids, counts = dataset.id_counts(field.name)
        ends = np.cumsum(counts)
        mean = ends[-1] / rows if field.multi_valued else 1.0
        bags = np.diff(np.floor(np.arange(_SAMPLE + 1) * mean)).astype(np.int64)
        drawn = uniform(number, np.arange(bags.sum(), dtype=np.uint64)) * ends[-1]
        found = np.searchsorted(ends, drawn, side="right")
        values.append(torch.from_numpy(ids.astype(np.int64)[found]))
        lengths.append(torch.from_numpy(bags))
    return KeyedJaggedTensor(
        keys=[field.name for field in fields],
        values=torch.cat(values),
        lengths=torch.cat(lengths),
        weights=torch.ones(sum(map(len, values))) if any(f.weighted for f in fields) else None,
        stride=_SAMPLE,
        length_per_key=[len(ids) for ids in values],
    )


def _resized(lookups: KeyedJaggedTensor, batch_size: int) -> KeyedJaggedTensor:
    """Returns look-ups of so many examples, on the meta device."""
    share = batch_size / lookups.stride()
    per_key = [round(length * share) for length in lookups.length_per_key()]
    keys = lookups.keys()
    weighted = lookups.weights_or_none() is not None
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.empty(sum(per_key), dtype=torch.int64, device="meta"),
        lengths=torch.empty(len(keys) * batch_size, dtype=torch.int64, device="meta"),
        weights=torch.empty(sum(per_key), device="meta") if weighted else None,
        stride=batch_size,
        length_per_key=per_key,
    )


class _Always(nn.Module):
    """Stands in for a module, and gives what it is told to give."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def forward(self, *_: object) -> Any:
        return self._value


def _saved_by_model(
    model: nn.Module,
    embeddings: CompressedEmbeddingBagCollection,
    job: Job,
    dataset: PreparedDataset,
    lookups: KeyedJaggedTensor,
) -> int:
    """Returns the bytes that all but the sharded tables save in a step, by taking it on meta.

    The model is of no use afterwards.
    """
    rows, schema = lookups.stride(), dataset.schema
    embeddings.ids = _Always(lookups)  # type: ignore[assignment]
    fused = [t for t in embeddings.merged_tables() if t.options.fused]
    if fused:
        widths = {name: t.stored_dim for t in fused for name in t.lookups}
        vectors = torch.empty(rows, sum(widths.values()), device="meta", requires_grad=True)
        pooled = KeyedTensor(list(widths), list(widths.values()), vectors)
        embeddings.fused = _Always(pooled)  # type: ignore[assignment]
    model.to("meta").train()
    embeddings.training = False  # its hooks look at values
    penalty = Penalty(job.embedding.l2, embeddings)
    bags = len(schema.categorical) * rows
    features = KeyedJaggedTensor(
        keys=[field.name for field in schema.categorical],
        values=torch.empty(0, dtype=torch.int64, device="meta"),
        lengths=torch.empty(bags, dtype=torch.int64, device="meta"),
        weights=torch.empty(0, device="meta") if embeddings.is_weighted() else None,
        stride=rows,
    )
    labels = torch.empty(rows, device="meta")
    weights = torch.empty(rows, device="meta") if schema.weight else None
    saved = SavedBytes([*model.parameters(), *model.buffers()])
    with saved:
        logits = model(torch.empty(rows, len(schema.dense), device="meta"), features)
        loss = binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
        penalty.added_to(loss, rows)
    return saved.total


def _check_sum(embeddings: CompressedEmbeddingBagCollection, memory: int, world_size: int) -> None:
    """Refuses tables that do not fit all memory there is, whatever the plan."""
    sizes = [t.size() for t in embeddings.merged_tables() if t.options.fused]
    needed = sum(s.parameter_bytes + s.optimizer_bytes for s in sizes)
    if needed > memory * world_size:
        raise UserError(
            f"sharding: tables and optimizer state take {needed:,} bytes, {world_size} processes "
            f"of {memory:,} have {memory * world_size:,}: {needed - memory * world_size:,} are "
            "missing; compress more, or give more processes or memory"
        )
