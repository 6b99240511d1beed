"""Whether a model may take the place of another: figures on the same held-out rows, and limits."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from recsys_compress.byte_sizes import parse_bytes
from recsys_compress.data import columns
from recsys_compress.data.dataset import MANIFEST, PreparedDataset
from recsys_compress.data.inputs import LabelInput
from recsys_compress.data.reader import Reader
from recsys_compress.data.sources.files import CsvFormat, column_names, find_files, read_tables
from recsys_compress.errors import UserError
from recsys_compress.files import read_toml
from recsys_compress.serve import rows as raw
from recsys_compress.serve.compare import Floats, auc_difference, drift
from recsys_compress.serve.predictor import BATCH_ROWS, Predictor
from recsys_compress.settings import STRICT, Count, Fraction, NonNegative, Rate, parse
from recsys_compress.train.metrics import BinaryMetrics

_WARM_UP, _TIMED = 5, 50
_LEAST = (
    1e-7  # probability whose logarithm still counts; float32 has nothing between 1 and 1 - 6e-8
)


@dataclass(frozen=True, kw_only=True)
class GatePolicy:
    """The limits that a challenger must keep; None leaves one out.

    Attributes:
        confidence: of the interval of the AUC difference.
        min_auc_difference: least lower end of that interval, challenger minus champion: with
            -0.001 the challenger is, that surely, not worse by more.
        min_auc: least AUC.
        max_logloss_increase: most that logloss may rise, in nats.
        min_calibration: least ratio of predicted to observed positives.
        max_calibration: greatest.
        max_bytes: most bytes of the artifact, like "2MB".
        max_latency_ms: most milliseconds in which 95 % of calls must be answered here.
        latency_rows: rows of such a call.
        max_drift: most that the population stability index of the scores may be.
        min_rows: least held-out rows.
    """

    __pydantic_config__ = STRICT

    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    min_auc_difference: float | None = -0.001
    min_auc: Fraction | None = None
    max_logloss_increase: float | None = 0.001
    min_calibration: NonNegative | None = 0.9
    max_calibration: NonNegative | None = 1.1
    max_bytes: str | Count | None = None
    max_latency_ms: Rate | None = None
    latency_rows: Count = 100
    max_drift: NonNegative | None = 0.25
    min_rows: Count = 1000


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure against one limit: `value` must be at least, or at most, `limit`."""

    figure: str
    value: float
    limit: float
    least: bool

    @property
    def passed(self) -> bool:
        """Whether the limit is kept; a figure that is not defined keeps none."""
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.least else "at most"
        return f"{self.figure} {self.value:.6g}, must be {bound} {self.limit:.6g}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the comparison found.

    Attributes:
        figures: by name; those that need a champion are absent without one.
        checks: against the limits.
    """

    figures: dict[str, float]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The limits that are not kept."""
        return tuple(check for check in self.checks if not check.passed)


def load_policy(path: Path | None) -> GatePolicy:
    """Reads a gate's limits from a TOML file; without one they are the defaults.

    Raises:
        UserError: the file cannot be read or parsed, or a key or value is not valid.
    """
    if path is None:
        return GatePolicy()
    policy = parse(GatePolicy, read_toml(path, "name a TOML file"), where=str(path))
    if isinstance(policy.max_bytes, str):
        parse_bytes(policy.max_bytes)
    return policy


def judge(
    challenger: Predictor, champion: Predictor | None, data: Path, policy: GatePolicy
) -> Report:
    """Compares two models on the same held-out rows.

    Args:
        challenger: the new model.
        champion: the one that it may replace; without one only absolute limits hold.
        data: a prepared dataset, whose test split is read, or Parquet files with raw rows and the
            label; a dataset has the ids of one preparation, so both models must be trained on it.
        policy: the limits.

    Raises:
        UserError: the rows cannot be read, or are not fit for both models.
    """
    models = [challenger, *([] if champion is None else [champion])]
    truth, weights, scores, first = _score(models, data, policy.latency_rows)
    new = _metrics(truth, scores[0], weights)
    figures = {
        "rows": float(len(truth)),
        **{name: new[name] for name in ("auc", "logloss", "calibration")},
        "bytes": float(challenger.artifact.total_bytes),
        "latency_ms": _latency(challenger, first[0]),
    }
    if champion is not None:
        found = auc_difference(truth, scores[1], scores[0], policy.confidence, weights)
        figures |= {
            "auc_difference": found.difference,
            "auc_difference_low": found.low,
            "auc_difference_high": found.high,
            "logloss_increase": new["logloss"] - _metrics(truth, scores[1], weights)["logloss"],
            "drift": drift(scores[1], scores[0]),
            "champion_latency_ms": _latency(champion, first[1]),
        }
    return Report(figures=figures, checks=tuple(_checks(figures, policy)))


def _checks(figures: dict[str, float], policy: GatePolicy) -> Iterator[Check]:
    size = policy.max_bytes
    least = {
        "rows": policy.min_rows,
        "auc": policy.min_auc,
        "auc_difference_low": policy.min_auc_difference,
        "calibration": policy.min_calibration,
    }
    most = {
        "logloss_increase": policy.max_logloss_increase,
        "calibration": policy.max_calibration,
        "bytes": parse_bytes(size) if isinstance(size, str) else size,
        "latency_ms": policy.max_latency_ms,
        "drift": policy.max_drift,
    }
    for limits, is_least in ((least, True), (most, False)):
        for figure, limit in limits.items():
            if limit is not None and figure in figures:
                yield Check(figure=figure, value=figures[figure], limit=limit, least=is_least)


Batch = tuple[Tensor, Any]
Known = tuple[Floats, Floats]  # (B,) labels and example weights


def _score(
    models: Sequence[Predictor], data: Path, latency_rows: int
) -> tuple[Floats, Floats, list[Floats], list[Batch]]:
    """Returns (N,) labels and weights, each model's (N,) scores, and its form of the first rows."""
    rows = _prepared if (data / MANIFEST).is_file() else _raw
    truth: list[Known] = []
    scores: list[list[Floats]] = [[] for _ in models]
    for known, batches in rows(models, data, BATCH_ROWS):
        truth.append(known)
        for model, batch, found in zip(models, batches, scores, strict=True):
            found.append(model.predict_tensors(*batch).astype(np.float64))
    if not truth:
        raise UserError(f"{data}: has no rows; name held-out rows")
    _, first = next(rows(models, data, latency_rows))
    labels, weights = map(np.concatenate, zip(*truth, strict=True))
    return labels, weights, [np.concatenate(parts) for parts in scores], first


def _prepared(
    models: Sequence[Predictor], data: Path, size: int
) -> Iterator[tuple[Known, list[Batch]]]:
    """Yields what is known of rows of the test split of a dataset, and each model's batch."""
    dataset = PreparedDataset.open(data)
    for model in models:
        if model.artifact.dataset != dataset.checksum:
            raise UserError(
                f"{data}: is not what run {model.artifact.run} was trained on, so its ids are "
                "others; give raw rows with the label as Parquet"
            )
    for batch in Reader(dataset, "test", batch_size=size):
        weights = torch.ones_like(batch.labels) if batch.weights is None else batch.weights
        known = batch.labels.double().numpy(), weights.double().numpy()
        yield known, [(batch.dense, batch.sparse)] * len(models)


def _raw(models: Sequence[Predictor], data: Path, size: int) -> Iterator[tuple[Known, list[Batch]]]:
    """Yields what is known of raw rows, and each model's batch."""
    artifact = models[0].artifact
    label = artifact.inputs.label or LabelInput(column=artifact.schema.label)
    weight = artifact.schema.weight
    for path in find_files(str(data), (".parquet",)):
        names = column_names(path)
        if label.column not in names:
            raise UserError(f"{path}: has no column {label.column!r}; held-out rows need the label")
        if weight is not None and weight not in names:
            raise UserError(
                f"{path}: has no column {weight!r}; held-out rows need their weights, as in "
                "training, or 1"
            )
        for model in models:
            raw.check_columns(names, model.artifact.inputs, str(path))
        wanted = [column for model in models for column in model.artifact.inputs.columns()]
        row = 1
        wanted += [label.column, *([] if weight is None else [weight])]
        for table in read_tables(path, wanted, size, CsvFormat()):
            truth = label.labels(table, str(path), row).to_numpy().astype(np.float64)
            weights = np.ones(len(truth))
            if weight is not None:
                weights = columns.weights(table[weight], weight, str(path), row).to_numpy()
            yield (
                (truth, weights.astype(np.float64)),
                [_encoded(model, table, str(path), row) for model in models],
            )
            row += table.num_rows


def _encoded(model: Predictor, table: pa.Table, where: str, row: int) -> Batch:
    found = raw.features(table, model.artifact.inputs, where, row)
    return raw.tensors(found, model.artifact.schema, model.encoders)


def _metrics(truth: Floats, scores: Floats, weights: Floats) -> dict[str, float]:
    metrics = BinaryMetrics()
    logits = torch.logit(torch.from_numpy(scores), eps=_LEAST)
    metrics.update(logits, torch.from_numpy(truth), torch.from_numpy(weights))
    return metrics.compute()


def _latency(model: Predictor, batch: Batch) -> float:
    """Returns the milliseconds in which 95 % of calls with encoded rows are answered."""
    taken = []
    for _ in range(_WARM_UP + _TIMED):
        before = time.perf_counter()
        model.predict_tensors(*batch)
        taken.append(time.perf_counter() - before)
    return float(np.quantile(taken[_WARM_UP:], 0.95)) * 1000
