"""A deployed model: raw rows in, probabilities out.

It needs neither the data it was trained on nor MLflow; see docs/deploy.md for the packages.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recsys_compress.compress.policy import Policy
from recsys_compress.compress.storage import QuantizedEmbeddingBagCollection, StoragePlan
from recsys_compress.config import load_job
from recsys_compress.data.dataset import read_table
from recsys_compress.data.encode import FieldEncoder, HashEncoder, VocabularyEncoder
from recsys_compress.data.inputs import Inputs
from recsys_compress.data.schema import CategoricalField
from recsys_compress.data.sources.files import CsvFormat, column_names, find_files, read_tables
from recsys_compress.errors import UserError
from recsys_compress.models import build_model
from recsys_compress.models.quantized import empty_layers
from recsys_compress.runtime import flush_denormals
from recsys_compress.serve import rows as raw
from recsys_compress.serve.artifact import (
    DENSE,
    JOB,
    LOWERING,
    TABLES,
    VOCABULARY,
    Artifact,
    read_artifact,
)
from recsys_compress.train.build import EMBEDDINGS, lowered

BATCH_ROWS = 8192

Floats = npt.NDArray[np.float32]

# torch says so on torchrec's first look-up, and no user can act on it.
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: "is_fx_tracing will return" not in record.getMessage()
)


class Predictor:
    """A loaded artifact; it may be used by several threads at once.

    Attributes:
        artifact: what it holds.
        embeddings: the tables.
        encoders: of raw values to ids, by field.
    """

    def __init__(
        self, artifact: Artifact, model: nn.Module, encoders: dict[str, FieldEncoder]
    ) -> None:
        """Takes the parts; `load` makes them."""
        self.artifact = artifact
        self.encoders = encoders
        self.embeddings: QuantizedEmbeddingBagCollection = model.embeddings  # type: ignore[assignment]
        self._model = model.eval()

    @classmethod
    def load(cls, path: Path | str, *, checksum: str | None = None) -> "Predictor":
        """Loads an artifact; every file is compared with its checksum first, and none holds code.

        Args:
            path: the artifact's folder.
            checksum: SHA-256 of its `artifact.json`, where it is known from elsewhere.

        Raises:
            UserError: it is no artifact, or it has been changed.
        """
        folder = Path(path)
        artifact = read_artifact(folder, checksum)
        try:
            encoders = {f.name: _encoder(folder, f) for f in artifact.schema.categorical}
            return cls(artifact, _model(folder, artifact), encoders)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder}: does not fit together ({error}); export it anew") from error

    def predict(self, rows: Any) -> Floats:
        """Returns (N,) float32 probabilities of label 1, in the order of the rows.

        Args:
            rows: a pandas DataFrame, an Arrow table or the path of Parquet files, with the raw
                columns of the source; others are ignored. A missing id is null (None or NaN in
                pandas), and a value not seen in training counts as unknown. A missing number takes
                the place that it had in training; where there was none it is refused.

        Raises:
            UserError: a column is missing, or holds what it must not.
        """
        found = [self.predict_table(*part) for part in self._tables(rows)]
        return np.concatenate(found) if found else np.empty(0, dtype=np.float32)

    def predict_table(self, table: pa.Table, where: str = "rows", row: int = 1) -> Floats:
        """Returns the probabilities of some rows at once.

        Args:
            table: has the columns that the model reads.
            where: its file, for messages.
            row: number of its first row, from 1.

        Raises:
            UserError: a column holds what it must not, or numbers that the model cannot bear.
        """
        if not table.num_rows:
            return np.empty(0, dtype=np.float32)
        found = raw.features(table, self.artifact.inputs, where, row)
        scores = self.predict_tensors(*raw.tensors(found, self.artifact.schema, self.encoders))
        if not np.isfinite(scores).all():
            bad = row + int(np.flatnonzero(~np.isfinite(scores))[0])
            raise UserError(
                f"{where}: row {bad} has no score: the model's layers overflow with its numbers; "
                "give it numbers like those that it was trained on"
            )
        return scores

    def predict_tensors(self, dense: Tensor, sparse: Any) -> Floats:
        """Returns the probabilities of rows that are encoded already.

        Args:
            dense: (B, N) float32.
            sparse: KeyedJaggedTensor of stride B.
        """
        flush_denormals()  # of whichever thread this is
        with torch.inference_mode():
            probabilities: Floats = torch.sigmoid(self._model(dense, sparse)).numpy()
        return probabilities

    def _tables(self, rows: Any) -> Iterator[tuple[pa.Table, str, int]]:
        """Yields the columns that the model reads some rows at a time, their file and first row."""
        inputs = self.artifact.inputs
        if isinstance(rows, str | Path):
            for path in find_files(str(rows), (".parquet",)):
                row = 1
                for table in read_rows(path, inputs):
                    yield table, str(path), row
                    row += table.num_rows
            return
        table = raw.to_table(rows, inputs, "rows")
        for first in range(0, table.num_rows, BATCH_ROWS):
            yield table.slice(first, BATCH_ROWS), "rows", first + 1


def read_rows(path: Path, inputs: Inputs) -> Iterator[pa.Table]:
    """Yields the columns that a model reads of a Parquet file, some rows at a time.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    raw.check_columns(column_names(path), inputs, str(path))
    yield from read_tables(path, inputs.columns(), BATCH_ROWS, CsvFormat())


def _encoder(folder: Path, field: CategoricalField) -> FieldEncoder:
    if field.encoding == "hash":
        return HashEncoder()
    path = folder / VOCABULARY.format(field.name)
    encoder = VocabularyEncoder.of(read_table(path, ["value"])["value"].combine_chunks())
    if encoder.num_embeddings != field.num_embeddings:
        raise UserError(
            f"{path}: has {encoder.num_embeddings} ids, not {field.num_embeddings}; export it anew"
        )
    return encoder


def _model(folder: Path, artifact: Artifact) -> nn.Module:
    """Returns the model with its weights."""
    job = load_job(folder / JOB)
    assignments = json.loads((folder / LOWERING).read_text(encoding="utf-8"))
    policy = Policy.described(assignments, where=str(folder / LOWERING))
    collection = lowered(job, artifact.schema, policy, torch.device("cpu"))
    embeddings = QuantizedEmbeddingBagCollection(collection, StoragePlan(types=artifact.storage))
    model = build_model(job.model, embeddings, len(artifact.schema.dense))
    if artifact.layers == "int8":
        empty_layers(model)
    weights = load_file(folder / DENSE)
    weights |= {EMBEDDINGS + name: w for name, w in load_file(folder / TABLES).items()}
    expected = {name: (w.shape, w.dtype) for name, w in model.state_dict().items()}
    if expected != {name: (w.shape, w.dtype) for name, w in weights.items()}:
        raise UserError(f"{folder}: its weights do not fit {JOB}; export the model anew")
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)
