"""The job: everything a training run depends on, as frozen dataclasses and as one TOML file.

`Job` is the whole; `load_job` reads it, `dump_job` writes the resolved form.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field

from recsys_compress.errors import UserError
from recsys_compress.files import read_toml
from recsys_compress.settings import (
    STRICT,
    Count,
    Fraction,
    NonNegative,
    Rate,
    merged,
    overridden,
    parse,
    without_none,
)

ModelName = Literal["dcnv2", "dlrm", "deepfm", "autoint"]
TableOptimizerName = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
DenseOptimizerName = Literal["adam", "adagrad", "sgd"]
DataType = Literal["fp32", "fp16", "bf16", "int8", "int4", "int2"]
Between = Literal["linear", "activation"]
ShardingKind = Literal["auto", "table_wise", "row_wise", "column_wise"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The prepared dataset and how it is read.

    Attributes:
        path: folder written by `recsys-compress prepare`.
        buffer_rows: rows held in memory for shuffling.
        streams: places of the training data that each batch is put together from; None for one a
            process. It decides the order of rows, which with the same number is the same in any
            number of processes.
    """

    __pydantic_config__ = STRICT

    path: str
    buffer_rows: Count = 500_000
    streams: Count | None = None


@dataclass(frozen=True, kw_only=True)
class DCNv2Config:
    """DCN-V2 (Wang et al., WWW 2021).

    Attributes:
        cross_layers: number of full-rank cross layers.
        hidden: widths of the deep part's layers; may be empty.
        structure: whether the deep part reads the cross part's output or stands beside it.
        batch_norm: whether the deep part's layers are batch-normalised.
        dropout: dropout rate of the deep part.
    """

    __pydantic_config__ = STRICT

    cross_layers: Count = 3
    hidden: tuple[Count, ...] = (256, 128)
    structure: Literal["parallel", "stacked"] = "parallel"
    batch_norm: bool = False
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class DLRMConfig:
    """DLRM (Naumov et al., 2019).

    Attributes:
        bottom: widths of the hidden layers over the dense features; the last layer's width is the
            embedding dim and is added.
        top: widths of the hidden layers over the interactions.
        batch_norm: whether hidden layers are batch-normalised.
        dropout: dropout rate of the hidden layers.
    """

    __pydantic_config__ = STRICT

    bottom: tuple[Count, ...] = (128,)
    top: tuple[Count, ...] = (256, 128)
    batch_norm: bool = False
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig:
    """DeepFM (Guo et al., IJCAI 2017).

    Attributes:
        hidden: widths of the deep part's layers.
        batch_norm: whether the deep part's layers are batch-normalised.
        dropout: dropout rate of the deep part.
    """

    __pydantic_config__ = STRICT

    hidden: tuple[Count, ...] = (256, 128)
    batch_norm: bool = False
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class AutoIntConfig:
    """AutoInt (Song et al., CIKM 2019).

    Attributes:
        attention_layers: number of interacting layers.
        attention_dim: width of each head's output times the number of heads.
        num_heads: attention heads.
        residual: whether each interacting layer adds a projection of its input.
        hidden: widths of the optional deep part beside it (AutoInt+); empty for none.
        batch_norm: whether the deep part's layers are batch-normalised.
        dropout: dropout rate of the attention weights and the deep part.
    """

    __pydantic_config__ = STRICT

    attention_layers: Count = 3
    attention_dim: Count = 64
    num_heads: Count = 2
    residual: bool = True
    hidden: tuple[Count, ...] = ()
    batch_norm: bool = False
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and the settings of each (so that `model.name` can be switched alone).

    Attributes:
        name: the model.
        ranks: by layer, like "deep.0" or "cross.1", the rank of the product of two thin layers that
            stands in its place; other layers are whole.
        between: whether a layer's activation also stands between its two thin ones.
    """

    __pydantic_config__ = STRICT

    name: ModelName = "dcnv2"
    ranks: dict[str, Count] = field(default_factory=dict)
    between: Between = "linear"
    dcnv2: DCNv2Config = field(default_factory=DCNv2Config)
    dlrm: DLRMConfig = field(default_factory=DLRMConfig)
    deepfm: DeepFMConfig = field(default_factory=DeepFMConfig)
    autoint: AutoIntConfig = field(default_factory=AutoIntConfig)


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """Which tables get which method; the first rule that matches a table wins.

    Attributes:
        table: the table's name, or a regular expression that matches the whole of it.
        method: name of the method.
    """

    __pydantic_config__ = STRICT

    table: str
    method: str


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """The embedding tables.

    Attributes:
        method: method of every table that no rule names and that has `min_rows` or more.
        dim: width D of every logical table.
        budget: bytes of all embedding parameters ("158kB", "2MiB", 4096) or a share of the full
            tables' bytes ("0.1x"); None leaves the method's own knobs as they are.
        min_rows: tables with fewer rows are left full.
        rules: exceptions by table.
        plan: plan file that says how each table is stored, in the place of `method`, `budget`,
            `rules` and `min_rows`; None for what they say.
        storage: type in which rows are to be served; training is in fp32.
        optimizer: of the tables. "rowwise_adagrad", "adagrad" and "sgd" run inside the backward
            pass and touch looked-up rows only; "adam" is dense, for replicated tables of at most
            `dense_rows` rows.
        learning_rate: of the tables.
        weight_decay: of tables trained by "adam", as an L2 term in the gradient of every row; no
            other optimizer has it.
        dense_rows: largest physical table, in rows, that "adam" may train.
        epsilon: added to the root of an Adagrad table's sums of squared gradients; the larger, the
            smaller the first steps of rarely seen rows.
        init_range: tables start uniform in [-init_range, init_range].
        l2: strength of a penalty on looked-up vectors: l2/2 times the squared norm of an example's
            vectors, averaged over the batch, is added to the loss.
        seed: of the hash functions.
        methods: the knobs of methods, by name; see `recsys-compress methods`.
    """

    __pydantic_config__ = STRICT

    method: str = "full"
    dim: Count = 16
    budget: str | Count | None = None
    min_rows: Annotated[int, Field(ge=0)] = 100
    rules: tuple[RuleConfig, ...] = ()
    plan: str | None = None
    storage: DataType = "fp32"
    optimizer: TableOptimizerName = "rowwise_adagrad"
    learning_rate: Rate = 0.02
    weight_decay: NonNegative = 0.0
    dense_rows: Count = 100_000
    epsilon: Rate = 1e-8
    init_range: Rate = 0.05
    l2: NonNegative = 0.0
    seed: int = 0
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def stored_by(self) -> str:
        """The method, or "plan" where a plan has the say."""
        return "plan" if self.plan else self.method


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run.

    Attributes:
        epochs: most passes over the training split; 0 only where a trained model is compressed and
            is not to be fine-tuned.
        batch_size: examples per step, over all ranks.
        eval_batch_size: examples per step of evaluation.
        learning_rate: of the dense part.
        optimizer: of the dense part.
        weight_decay: of the dense part (decoupled).
        schedule: how learning rates fall from their start towards 0 over the epochs.
        evals_per_epoch: evaluations on the validation split in each epoch.
        patience: evaluations without a better monitor after which training stops.
        monitor: the validation figure that picks the checkpoint.
        checkpoint_steps: steps between checkpoints for resuming; 0 for none but at evaluations.
        background_checkpoints: whether checkpoints are written while training goes on, which takes
            memory for a second copy of what a process holds.
        precision: of the layers' products in training. In "bf16" tables, all values that are kept,
            the loss and evaluation stay in fp32.
        seed: of initial values and row order.
        threads: CPU threads; 0 for all.
        device: "cpu" or "cuda".
        output: folder in which the run's own folder is made.
    """

    __pydantic_config__ = STRICT

    epochs: Annotated[int, Field(ge=0)] = 10
    batch_size: Count = 4096
    eval_batch_size: Count = 16384
    learning_rate: Rate = 1e-3
    optimizer: DenseOptimizerName = "adam"
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    evals_per_epoch: Count = 1
    patience: Count = 2
    monitor: Literal["auc", "logloss"] = "auc"
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    background_checkpoints: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=0)] = 0
    device: Literal["cpu", "cuda"] = "cpu"
    output: str = "runs"

    def score(self, valid: Mapping[str, float]) -> float:
        """Returns the monitor's figure among those of validation, so that more is better.

        One that is not defined, like the AUC of one class, is the worst.
        """
        figure = -valid["logloss"] if self.monitor == "logloss" else valid["auc"]
        return -math.inf if math.isnan(figure) else figure

    def evaluation_steps(self, steps: int) -> set[int]:
        """Returns the steps of an epoch of so many, modulo its length, after which to evaluate."""
        each = self.evals_per_epoch
        return {-(-steps * i // each) % steps for i in range(1, each + 1)}


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the run is recorded.

    Attributes:
        uri: MLflow tracking URI; the environment's MLFLOW_TRACKING_URI, where set, wins over the
            default but not over a value in the job.
        experiment: MLflow experiment.
        run_name: MLflow run name; None makes one like "dcnv2-unified-10x-s0".
        parent: id of the MLflow run in which this one is nested.
    """

    __pydantic_config__ = STRICT

    uri: str | None = None
    experiment: str = "recsys-compress"
    run_name: str | None = None
    parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How fused tables are divided among the processes; of no effect in one process alone.

    Attributes:
        kind: how each table is divided. "auto" leaves that and the placement to TorchRec's planner.
        ranks_per_host: processes of a host; None for what the launcher says; in a plan, all of them
            on CPU and 8 on GPUs.
        device_memory: of each GPU, for tables and buffers ("80GiB").
        host_memory: of each host ("256GiB"); None for what this one has.
        intra_host_bandwidth: between two processes of a host, bytes per second.
        inter_host_bandwidth: between two hosts, bytes per second.
        timeout: seconds after which a process that waits for another gives up.
    """

    __pydantic_config__ = STRICT

    kind: ShardingKind = "auto"
    ranks_per_host: Count | None = None
    device_memory: str | Count = "80GiB"
    host_memory: str | Count | None = None
    intra_host_bandwidth: str | Count = "600GB"
    inter_host_bandwidth: str | Count = "12.5GB"
    timeout: Count = 600


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job."""

    __pydantic_config__ = STRICT

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load_job(path: Path, overrides: Iterable[str] = ()) -> Job:
    """Reads a job from a TOML file, with `key=value` overrides (`train.seed=1`).

    Besides the job's own sections the file may have `[variants.METHOD.SECTION]`: settings that hold
    where `embedding.method` is METHOD. Overrides win over them.

    Raises:
        UserError: the file cannot be read or parsed, or a key or value is not valid.
    """
    return parse(Job, raw_job(path, overrides), where=str(path))


def raw_job(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Returns what `load_job` makes a job of: only the keys that are set, unchecked.

    Raises:
        UserError: the file cannot be read or parsed, or a variant is not valid.
    """
    raw = read_toml(path, "name a job file")
    variants = raw.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise UserError(f"{path}: variants must be sections like [variants.unified.train]")
    overrides = list(overrides)
    for name, variant in variants.items():  # each must be valid, chosen or not
        parse(Job, merged(raw, variant), where=f"{path}: variants.{name}")
    chosen = overridden(raw, overrides).get("embedding", {})
    method = chosen.get("method", "full") if isinstance(chosen, dict) else None
    return overridden(merged(raw, variants.get(method, {})), overrides)


def dump_job(job: Job) -> str:
    """Returns the resolved job as TOML: every key, except those that are None."""
    return tomli_w.dumps(without_none(dataclasses.asdict(job)))
