"""FuxiCTR: its embeddings, layers, base model, optimizer and training step."""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CrossNetV2, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from benchmarks.peers.contestant import CROSS_LAYERS, DENSE_RATE, HIDDEN, Rows, Sizes

LABEL = "label"


class CrossModel(BaseModel):  # type: ignore[misc]
    """DCN-V2, or without cross layers a DNN, of FuxiCTR's parts.

    The package holds layers, base model and training; the models built on them are scripts of its
    repository. This is the one with the cross part beside the deep part.

    Args:
        feature_map: the features.
        dim: width D.
        cross_layers: number of full-rank cross layers; may be 0.
        hidden: widths of the deep part's layers.
        dropout: of the deep part.
        batch_norm: of the deep part.
        settings: of the base model.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        *,
        dim: int,
        cross_layers: int = CROSS_LAYERS,
        hidden: Sequence[int] = HIDDEN,
        dropout: float = 0.0,
        batch_norm: bool = False,
        **settings: Any,
    ) -> None:
        defaults = {"verbose": 0, "metrics": ["AUC", "logloss"]}
        super().__init__(feature_map, **{**defaults, **settings})
        self.embedding_layer = FeatureEmbedding(feature_map, dim)
        width = feature_map.sum_emb_out_dim()
        self.cross = CrossNetV2(width, cross_layers) if cross_layers else None
        self.deep = MLP_Block(
            input_dim=width,
            hidden_units=list(hidden),
            dropout_rates=dropout,
            batch_norm=batch_norm,
        )
        self.head = nn.Linear(hidden[-1] + (width if cross_layers else 0), 1)
        self.compile("adam", "binary_crossentropy", DENSE_RATE)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns (B, 1) probabilities under the name that the base model reads."""
        x = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        parts = [self.deep(x)] if self.cross is None else [self.cross(x), self.deep(x)]
        return {"y_pred": self.output_activation(self.head(torch.cat(parts, dim=-1)))}


def feature_map(
    vocabularies: dict[str, int], dense: Sequence[str], dim: int, folder: Path
) -> FeatureMap:
    """Returns the features in FuxiCTR's terms; dense ones are taken as they are, as all others do.

    By default it would give each dense feature a vector of width D too.
    """
    found = FeatureMap("benchmark", str(folder))
    found.features = OrderedDict(
        {
            name: {"type": "categorical", "source": "", "vocab_size": rows}
            for name, rows in vocabularies.items()
        }
    )
    found.features |= {n: {"type": "numeric", "source": "", "embedding_dim": 1} for n in dense}
    found.labels = [LABEL]
    found.default_emb_dim = dim
    found.num_fields = found.get_num_fields()
    found.set_column_index()
    return found


class Fuxi:
    """FuxiCTR on the benchmark's data."""

    def __init__(self, sizes: Sizes, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self._sizes = sizes
        vocabularies = dict(zip(sizes.names, sizes.tables, strict=True))
        features = feature_map(vocabularies, sizes.dense_names, sizes.dim, folder)
        self.model = CrossModel(features, dim=sizes.dim, model_root=str(folder))
        self.model._max_gradient_norm = 10.0  # what its `fit` sets
        self.optimizers: list[torch.optim.Optimizer] = [self.model.optimizer]
        self.model.train()

    def step(self, rows: Rows) -> None:
        """Takes its training step, and reads the loss as its loop does."""
        self.model.train_step(self._inputs(rows)).item()

    def scores(self, rows: Rows) -> Any:
        """Returns what its `predict` does."""
        found = self.model.predict([self._inputs(rows)])
        self.model.train()
        return found

    def save(self, path: Path) -> None:
        """Writes its checkpoint."""
        self.model.save_weights(path)

    def served(self, _path: Path, _storage: str) -> Callable[[Rows], Any]:
        """Returns `scores`: there is no other form."""
        return self.scores

    def _inputs(self, rows: Rows) -> dict[str, Tensor]:
        inputs = dict(zip(self._sizes.names, rows.ids, strict=True))
        inputs |= dict(zip(self._sizes.dense_names, rows.dense.T, strict=True))
        return inputs | {LABEL: rows.labels}


@contextmanager
def contestant(_name: str, sizes: Sizes, seed: int) -> Iterator[Fuxi]:
    """Holds the contestant and its folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Fuxi(sizes, Path(folder), seed)
