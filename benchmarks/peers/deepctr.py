"""DeepCTR-Torch: its DCN with matrices as cross layers, and its `fit`, a batch at a time."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
import torch

from benchmarks.peers.contestant import CROSS_LAYERS, HIDDEN, Rows, Sizes


def _offline(*_: object, **__: object) -> None:
    raise OSError("no network in a benchmark")


requests.get = _offline  # as it is imported, it asks the network for its newest version

from deepctr_torch.inputs import DenseFeat, SparseFeat  # noqa: E402
from deepctr_torch.models import DCN  # noqa: E402


class DeepCtr:
    """DeepCTR-Torch on the benchmark's data.

    It has no linear part here and no L2 terms, by default over all rows, as the others have none.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self._sizes = sizes
        columns = [
            *(
                SparseFeat(name, vocabulary_size=rows, embedding_dim=sizes.dim)
                for name, rows in zip(sizes.names, sizes.tables, strict=True)
            ),
            *(DenseFeat(name) for name in sizes.dense_names),
        ]
        self.model = DCN(
            [],
            columns,
            cross_num=CROSS_LAYERS,
            cross_parameterization="matrix",
            dnn_hidden_units=HIDDEN,
            l2_reg_linear=0,
            l2_reg_embedding=0,
            l2_reg_cross=0,
            seed=seed,
        )
        self.model.compile("adam", "binary_crossentropy")  # at a rate of 1e-3
        self.optimizers: list[torch.optim.Optimizer] = [self.model.optim]

    def step(self, rows: Rows) -> None:
        """Fits a batch."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.model.fit(self._inputs(rows), rows.labels.numpy(), batch_size=len(rows), verbose=0)

    def scores(self, rows: Rows) -> Any:
        """Returns what its `predict` does."""
        return self.model.predict(self._inputs(rows), len(rows))[:, 0]

    def save(self, path: Path) -> None:
        """Writes its weights, as its documentation does."""
        torch.save(self.model.state_dict(), path)

    def served(self, _path: Path, _storage: str) -> Callable[[Rows], Any]:
        """Returns `scores`: there is no other form."""
        return self.scores

    def _inputs(self, rows: Rows) -> dict[str, Any]:
        inputs = dict(zip(self._sizes.names, rows.ids.numpy(), strict=True))
        return inputs | dict(zip(self._sizes.dense_names, rows.dense.T.numpy(), strict=True))


@contextlib.contextmanager
def contestant(_name: str, sizes: Sizes, seed: int) -> Iterator[DeepCtr]:
    """Holds the contestant."""
    yield DeepCtr(sizes, seed)
