"""What every contestant is given, and what is asked of it; without any library but torch."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Shape
from benchmarks.ids import random_ids

# DCN-V2 as all have it: full-rank cross layers beside a deep part.
CROSS_LAYERS = 3
HIDDEN = (256, 128)
DENSE_RATE = 1e-3  # of Adam, for all that is trained by it

LABELS = {
    "full": "ours, full",
    "full fp32": "ours, full, fp32 artifact",
    "full int8": "ours, full, int8 artifact",
    "full int8 layers": "ours, full, int8 artifact, layers too",
    "full bf16": "ours, full, layers trained in bf16",
    "unified": "ours, unified at 1/10 of the bytes",
    "unified fp32": "ours, unified at 1/10, fp32 artifact",
    "unified int8": "ours, unified at 1/10, int8 artifact",
    "unified int8 layers": "ours, unified at 1/10, int8 artifact, layers too",
    "stock": "TorchRec, 26 tables",
    "stock bf16": "TorchRec, 26 tables, layers trained in bf16",
    "sparse": "torch, nn.EmbeddingBag(sparse), Adagrad",
    "dense": "torch, nn.Embedding, dense Adam",
    "fuxictr": "FuxiCTR",
    "deepctr": "DeepCTR-Torch",
}
# What the environment of the peers holds; all else runs in that of this project.
PEERS = {"fuxictr": "benchmarks.peers.fuxi", "deepctr": "benchmarks.peers.deepctr"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model's size.

    Attributes:
        tables: rows of each table.
        dim: width D.
        dense: dense features N.
    """

    tables: tuple[int, ...]
    dim: int
    dense: int

    @classmethod
    def of(cls, shape: Shape) -> "Sizes":
        """Returns that of a workload with tables of equal size."""
        tables = (shape.rows_per_table,) * shape.features
        return cls(tables=tables, dim=shape.dim, dense=shape.dense)

    @property
    def names(self) -> list[str]:
        """The features, which are also the tables."""
        return [f"feature_{index}" for index in range(len(self.tables))]

    @property
    def dense_names(self) -> list[str]:
        """The dense features."""
        return [f"dense_{index}" for index in range(self.dense)]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """B examples.

    Attributes:
        dense: (B, N) float32.
        ids: (F, B) int64.
        labels: (B,) float32, 0 or 1.
    """

    dense: Tensor
    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, last: int) -> "Rows":
        """Returns the examples from `first` on, before `last`."""
        return Rows(
            dense=self.dense[first:last],
            ids=self.ids[:, first:last].contiguous(),
            labels=self.labels[first:last],
        )

    def write(self, folder: Path) -> None:
        """Writes the examples to a folder."""
        folder.mkdir(parents=True)
        for name, value in vars(self).items():
            np.save(folder / f"{name}.npy", value.numpy())

    @classmethod
    def read(cls, folder: Path) -> "Rows":
        """Returns what `write` wrote."""
        return cls(
            **{
                name: torch.from_numpy(np.load(folder / f"{name}.npy"))
                for name in ("dense", "ids", "labels")
            }
        )


def random_batches(shape: Shape, count: int = 4) -> list[Rows]:
    """Returns batches of uniform ids; the same in every environment."""
    ids = random_ids(shape, zipf=0.0, count=count)
    generator = torch.Generator().manual_seed(1)
    return [
        Rows(
            dense=torch.randn(shape.batch, shape.dense, generator=generator),
            ids=own.view(shape.features, shape.batch),
            labels=(torch.rand(shape.batch, generator=generator) < 0.3).float(),
        )
        for own in ids
    ]


class Contestant(Protocol):
    """A library's DCN-V2 with its optimizers."""

    optimizers: list[torch.optim.Optimizer]

    def step(self, rows: Rows) -> None:
        """Takes a training step, as the library itself does."""

    def scores(self, rows: Rows) -> Any:
        """Returns the probabilities of some rows, through what the library has for it."""

    def save(self, path: Path) -> None:
        """Writes what the library keeps of a trained model, a file or a folder."""

    def served(self, path: Path, storage: str) -> Callable[[Rows], Any]:
        """Returns what gives the probabilities where the model is served.

        Args:
            path: that does not exist yet, for what is saved and loaded on the way.
            storage: type of the tables' values; "int8 layers" for the layers in int8 too.
        """


def load(name: str) -> Any:
    """Imports the libraries of a contestant, and returns the module that has it."""
    return importlib.import_module(PEERS.get(name.split()[0], "benchmarks.peers.keyed"))


def open_contestant(name: str, sizes: Sizes, seed: int = 0) -> AbstractContextManager[Contestant]:
    """Returns a contestant, for a `with` statement.

    Args:
        name: a key of `LABELS`.
        sizes: of the model.
        seed: of its first values.
    """
    found: AbstractContextManager[Contestant]
    found = load(name).contestant(name, sizes, seed)
    return found


def size(path: Path) -> int:
    """Returns the bytes of a file, or of all files of a folder."""
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())
