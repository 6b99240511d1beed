"""Dense tables under a mask, trained plainly, and what `dynamic_sparse` has in their place."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.compress import CompressedEmbeddingBagCollection, Policy, Rule, TableOptions
from recsys_compress.compress.bitmap import Bitmap, draw, unpack
from recsys_compress.compress.blocks import BlockIds, Layout
from recsys_compress.compress.growth import Growing, Schedule
from recsys_compress.compress.hook import LiveTable
from recsys_compress.compress.methods.dynamic_sparse import DynamicSparse
from recsys_compress.train.shard import full_tensors, shard
from tests.compress.tables import ROWS, make_tables

IDS = sum(ROWS.values())
EPSILON = 0.01


def make(
    method: DynamicSparse,
    optimizer: str = "adam",
    *,
    dim: int = 12,
    is_weighted: bool = False,
    pooling: PoolingType = PoolingType.SUM,
) -> CompressedEmbeddingBagCollection:
    torch.manual_seed(0)
    # A large epsilon keeps the first updates of blocks from being equally long.
    options = TableOptions(optimizer=optimizer, epsilon=EPSILON)
    return CompressedEmbeddingBagCollection(
        tables=make_tables(dim, pooling),
        policy=Policy(default=Rule(method=method, options=options), min_rows=0),
        is_weighted=is_weighted,
    )


def make_hook(
    total: int, count: int, *, spans: Sequence[tuple[int, int]] | None = None, **schedule: float
) -> tuple[Growing, Bitmap, Tensor, Layout]:
    """Returns the hook of one table of `total` ids of one block, and its (count, 2) pool."""
    table = EmbeddingBagConfig(name="t", feature_names=["t"], num_embeddings=total, embedding_dim=2)
    layout, index = Layout.of([table], 2), Bitmap(total)
    index.fill(draw(index.words, 0, total, count, torch.Generator().manual_seed(0)))
    pool = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    hook = Growing(
        layout=layout,
        index=index,
        schedule=Schedule(**{"every": 1, "window": 1, "ratio": 0.5, "stop": 1.0, **schedule}),
        random=spans is None and schedule.get("window") == 0,
        spans=spans or [(0, total)],
        table="pool",
        seed=0,
        most_ids=1000,
    )
    return hook, index, pool, layout


def index_of(collection: CompressedEmbeddingBagCollection) -> Bitmap:
    (ids,) = (m for m in collection.modules() if isinstance(m, BlockIds))
    return ids.index


def pool_of(collection: CompressedEmbeddingBagCollection) -> Tensor:
    (pool,) = collection.parameters()
    return pool


def dense(mask: Tensor, pool: Tensor) -> Tensor:
    """Returns (ids, D) with the pool's rows where (ids, blocks) are stored."""
    values = torch.zeros(*mask.shape, *pool.shape[1:])
    values[mask] = pool.detach()
    return values.flatten(1)


def mask_of(index: Bitmap, blocks: int) -> Tensor:
    return unpack(index.words)[: index.length].view(-1, blocks)


def pooled(table: Tensor, batch: KeyedJaggedTensor) -> Tensor:
    """Returns (B, F x D) sums of rows of one table of all ids, by autograd's own operations."""
    firsts = dict(zip(ROWS, (0, 5000, 8000), strict=True))
    outputs = []
    for name in ROWS:
        bags = torch.arange(batch.stride()).repeat_interleave(batch[name].lengths().long())
        rows = table[firsts[name] + batch[name].values()]
        if batch.weights_or_none() is not None:
            rows = rows * batch[name].weights()[:, None]
        zeros = torch.zeros(batch.stride(), table.shape[1], dtype=table.dtype)
        outputs.append(zeros.index_add(0, bags, rows))
    return torch.cat(outputs, dim=1)


def single(batch_size: int, seed: int = 0, *, weighted: bool = False) -> KeyedJaggedTensor:
    """Returns a batch of one id a bag."""
    generator = torch.Generator().manual_seed(seed)
    return KeyedJaggedTensor(
        keys=list(ROWS),
        values=torch.cat(
            [torch.randint(n, (batch_size,), generator=generator) for n in ROWS.values()]
        ),
        lengths=torch.ones(3 * batch_size, dtype=torch.int32),
        weights=torch.rand(3 * batch_size, generator=generator) if weighted else None,
        stride=batch_size,
    )


class Plain:
    """Dynamic sparse learning with dense weights and a mask: what must come out, written plainly.

    Args:
        mask: (ids, blocks) of stored blocks.
        pool: (P, b) their first values.
        optimizer: "rowwise_adagrad" or "adam".
        spans: ranges of blocks within which their number is kept.
    """

    def __init__(
        self, mask: Tensor, pool: Tensor, optimizer: str, spans: Sequence[tuple[int, int]]
    ) -> None:
        self.mask = mask.clone()
        self.weight = dense(mask, pool).double()
        self.state = [torch.zeros_like(self.weight) for _ in range(2)]
        self.total = torch.zeros_like(self.weight)
        self.optimizer, self.spans, self.steps = optimizer, spans, 0

    def step(
        self, loss_of: Callable[[Tensor], Tensor], schedule: Schedule, progress: float
    ) -> None:
        self.weight.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(self.weight), [self.weight])
        self.weight.requires_grad_(False)
        if self.steps % schedule.every >= schedule.every - schedule.window:
            self.total += gradient
        self.steps += 1
        stored = self.mask.repeat_interleave(self.weight.shape[1] // self.mask.shape[1], dim=1)
        own = gradient * stored
        if self.optimizer == "adam":
            self.state[0].mul_(0.9).add_(0.1 * own)
            self.state[1].mul_(0.999).add_(0.001 * own.square())
            mean = self.state[0] / (1 - 0.9**self.steps)
            root = (self.state[1] / (1 - 0.999**self.steps)).sqrt()
            self.weight -= 0.02 * mean / (root + 1e-8)
        else:
            blocks = self.by_block(own).square().mean(2, keepdim=True)
            self.state[0] += blocks.expand_as(self.by_block(own)).flatten(1)
            self.weight -= 0.02 * own / (self.state[0].sqrt() + EPSILON)
        if self.steps % schedule.every == 0:
            if progress <= schedule.stop:
                self.update(schedule.ratio_at(progress))
            self.total.zero_()

    def by_block(self, values: Tensor) -> Tensor:
        return values.view(*self.mask.shape, -1)

    def update(self, ratio: float) -> None:
        before = self.mask.clone()
        norms, gradients = (
            self.by_block(v).norm(dim=2).view(-1) for v in (self.weight, self.total)
        )
        mask = self.mask.view(-1)
        for first, last in self.spans:
            inside = torch.arange(len(mask)).ge(first) & torch.arange(len(mask)).lt(last)
            stored = (inside & mask).nonzero().flatten()
            unseen = int((inside & ~mask & (gradients > 0)).sum())
            count = min(math.ceil(ratio * len(stored)), unseen)
            mask[stored[norms[stored].argsort(stable=True)[:count]]] = False
            zero = (inside & ~mask).nonzero().flatten()
            mask[zero[gradients[zero].argsort(descending=True)[:count]]] = True
        for values in (self.weight, *self.state):
            self.by_block(values)[~(before & self.mask)] = 0


class Run:
    """A sharded collection with its hook, driven as the trainer does.

    Args:
        method: of all tables.
        optimizer: of its pool.
        steps: of the whole training.
    """

    def __init__(self, method: DynamicSparse, optimizer: str, steps: int) -> None:
        self.collection = make(method, optimizer)
        self.model = shard(Holder(self.collection), self.collection, torch.device("cpu"))
        self.adam = None
        if optimizer == "adam":
            self.adam = torch.optim.Adam(self.model.parameters(), lr=0.02)
        (self.hook,) = self.collection.hooks()
        self.collection.bind_hooks(lambda _place: self.live())
        self.steps, self.done = steps, 0
        self.index = index_of(self.collection)

    def live(self) -> LiveTable:
        (weight,) = (
            v for n, v in full_tensors(self.model.state_dict()).items() if n.endswith("weight")
        )
        if self.adam is None:
            (state,) = self.model.fused_optimizer.state_dict()["state"].values()
            return LiveTable(weight=weight, state=full_tensors(state))
        (parameter,) = self.model.parameters()
        return LiveTable(weight=weight, state=self.adam.state[parameter])

    def step(self, batch: KeyedJaggedTensor) -> None:
        if self.adam is not None:
            self.adam.zero_grad()
        loss(self.model(batch)).backward()
        if self.adam is not None:
            self.adam.step()
        self.done += 1
        self.hook.on_step(self.done / self.steps)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that a checkpoint keeps."""
        live = self.live()
        found = {"weight": live.weight, "words": self.index.words, "counts": self.index.counts}
        found |= {f"state/{name}": value for name, value in live.state.items()}
        return found | {f"hook/{name}": value for name, value in self.hook.tensors().items()}


class Holder(torch.nn.Module):
    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        values: Tensor = self.embeddings(features).values()
        return values


def loss(vectors: Tensor) -> Tensor:
    """Returns a loss whose gradients differ by example and dimension."""
    scale = torch.linspace(-1, 1.3, vectors.shape[1], dtype=vectors.dtype)
    target = torch.linspace(-3, 3, vectors.shape[0], dtype=vectors.dtype)
    return ((vectors * scale).sum(1) - target).square().mean()
