"""Contestants that are given a `KeyedJaggedTensor`: ours, TorchRec's own, and plain torch."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from benchmarks.case import Shape
from benchmarks.peers.contestant import (
    CROSS_LAYERS,
    DENSE_RATE,
    HIDDEN,
    Rows,
    Sizes,
    random_batches,
)
from benchmarks.tables import CPU, OPTIONS, SHARE, quiet_process_group, shard_stock
from recsys_compress.compress import (
    CompressedEmbeddingBagCollection,
    Policy,
    Rule,
    StoragePlan,
    method_class,
    quantize,
)
from recsys_compress.compress.lowering import FP32_BYTES
from recsys_compress.compress.tensors import below
from recsys_compress.config import (
    DataConfig,
    DCNv2Config,
    EmbeddingConfig,
    Job,
    ModelConfig,
    dump_job,
)
from recsys_compress.data.hashing import HASH_VERSION
from recsys_compress.data.inputs import plain
from recsys_compress.data.schema import CategoricalField, Schema
from recsys_compress.files import to_json
from recsys_compress.models import build_model
from recsys_compress.models.quantized import round_layers
from recsys_compress.serve.artifact import (
    DENSE,
    FORMAT_VERSION,
    JOB,
    LOWERING,
    MANIFEST,
    TABLES,
    Artifact,
    File,
)
from recsys_compress.serve.predictor import Predictor
from recsys_compress.train.build import EMBEDDINGS
from recsys_compress.train.shard import full_tensors, shard

MODEL = ModelConfig(name="dcnv2", dcnv2=DCNv2Config(cross_layers=CROSS_LAYERS, hidden=HIDDEN))


class PlainTables(nn.Module):
    """A torch module for each table; from outside, an `EmbeddingBagCollection`.

    Args:
        configs: the tables, of one feature each.
        sparse: whether gradients hold looked-up rows only.
    """

    def __init__(self, configs: list[EmbeddingBagConfig], *, sparse: bool) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if sparse else nn.Embedding
        more: dict[str, Any] = {"sparse": True, "mode": "sum"} if sparse else {}
        self._configs = configs
        self._sparse = sparse
        self.tables = nn.ModuleList(
            kind(table.num_embeddings, table.embedding_dim, **more) for table in configs
        )
        for weight in self.parameters():
            nn.init.uniform_(weight, -OPTIONS.init_range, OPTIONS.init_range)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Returns the tables."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Returns the vectors of bags of one id each."""
        ids = features.values().view(len(self._configs), -1)
        vectors = [
            table(own[:, None] if self._sparse else own)
            for table, own in zip(self.tables, ids, strict=True)
        ]
        return KeyedTensor(
            keys=features.keys(),
            length_per_key=[table.embedding_dim for table in self._configs],
            values=torch.cat(vectors, dim=1),
        )


class Keyed:
    """DCN-V2 over tables of the kind "full", "unified", "stock", "sparse" or "dense".

    A kind followed by "bf16" has its layers trained in that.
    """

    def __init__(self, name: str, sizes: Sizes, seed: int) -> None:
        torch.manual_seed(seed)
        kind, _, form = name.partition(" ")
        self._bf16 = form == "bf16"
        self._sizes = sizes
        self._configs = [
            EmbeddingBagConfig(
                name=name, feature_names=[name], num_embeddings=rows, embedding_dim=sizes.dim
            )
            for name, rows in zip(sizes.names, sizes.tables, strict=True)
        ]
        if kind in ("sparse", "dense"):
            tables = PlainTables(self._configs, sparse=kind == "sparse")
            self.model: Any = self._dcn(tables)
            own = set(tables.parameters()) if kind == "sparse" else set()
            rest = [p for p in self.model.parameters() if p not in own]
            self.optimizers = [torch.optim.Adam(rest, lr=DENSE_RATE)]
            if own:
                rates = {"lr": OPTIONS.learning_rate, "eps": OPTIONS.epsilon}
                self.optimizers.append(torch.optim.Adagrad(tables.parameters(), **rates))
            return
        if kind == "stock":
            collection = EmbeddingBagCollection(tables=self._configs, device=torch.device("meta"))
            self.model = shard_stock(self._dcn(collection), collection)
        else:
            self._policy = self._fitted(kind)
            self._embeddings = CompressedEmbeddingBagCollection(
                tables=self._configs, policy=self._policy, fused_device=torch.device("meta")
            )
            self.model = shard(self._dcn(self._embeddings), self._embeddings, CPU)
        # Fused tables are updated inside the backward pass.
        fused = set(self.model.fused_optimizer.params)
        rest = [p for name, p in self.model.named_parameters() if name not in fused]
        self.optimizers = [torch.optim.Adam(rest, lr=DENSE_RATE, fused=True)]

    def step(self, rows: Rows) -> None:
        """Takes a training step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            logits = self.model(rows.dense, self._keyed(rows))
        binary_cross_entropy_with_logits(logits.float(), rows.labels).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def scores(self, rows: Rows) -> Tensor:
        """Returns the probabilities of the model that is trained."""
        self.model.eval()
        found = torch.sigmoid(self.model(rows.dense, self._keyed(rows)))
        self.model.train()
        return found

    def save(self, path: Path) -> None:
        """Writes an artifact for ours, and for all else a state dict."""
        if hasattr(self, "_policy"):
            self._write_artifact(path, "fp32")
        else:
            torch.save(full_tensors(self.model.state_dict()), path)

    def served(self, path: Path, storage: str) -> Callable[[Rows], Any]:
        """Returns the prediction of the artifact for ours, and for all else of the model."""
        if not hasattr(self, "_policy"):
            return self.scores
        self._write_artifact(path, storage)
        del self.model, self._embeddings, self.optimizers
        predictor = Predictor.load(path)
        self.look_up = lambda rows: predictor.embeddings(self._keyed(rows))
        return lambda rows: predictor.predict_tensors(rows.dense, self._keyed(rows))

    def _dcn(self, embeddings: nn.Module) -> nn.Module:
        return build_model(MODEL, embeddings, self._sizes.dense)

    def _fitted(self, kind: str) -> Policy:
        policy = Policy(default=Rule(method=method_class(kind)(), options=OPTIONS))
        if kind == "full":
            return policy
        whole = sum(self._sizes.tables) * self._sizes.dim * FP32_BYTES
        return policy.fit(self._configs, int(SHARE * whole))

    def _keyed(self, rows: Rows) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(
            keys=self._sizes.names,
            values=rows.ids.flatten(),
            lengths=torch.ones(rows.ids.numel(), dtype=torch.int64),
            stride=len(rows),
            length_per_key=[len(rows)] * len(self._configs),
        )

    def _write_artifact(self, folder: Path, storage: str) -> None:
        """Writes what `export` does; ids are given as they are, so that there is no vocabulary."""
        folder.mkdir()
        types, _, layers = storage.partition(" ")
        plan, state = StoragePlan(types=types), self.model.state_dict()
        stored = quantize(self._embeddings, plan, full_tensors(below(EMBEDDINGS, state)))
        tables = {name: value.contiguous() for name, value in stored.state_dict().items()}
        rest = {n: w for n, w in state.items() if not n.startswith(EMBEDDINGS)}
        dense = {name: value.contiguous() for name, value in full_tensors(rest).items()}
        if layers:
            dense = self._rounded(stored, dense)
        save_file(tables, folder / TABLES)
        save_file(dense, folder / DENSE)
        job = Job(
            data=DataConfig(path=""), model=MODEL, embedding=EmbeddingConfig(dim=self._sizes.dim)
        )
        (folder / JOB).write_text(dump_job(job), encoding="utf-8")
        (folder / LOWERING).write_text(json.dumps(self._policy.describe(self._configs)))
        fields = (
            CategoricalField(name=table.name, num_embeddings=table.num_embeddings, encoding="hash")
            for table in self._configs
        )
        artifact = Artifact(
            format=FORMAT_VERSION,
            hash_version=HASH_VERSION,
            run="",
            dataset="",
            method="",
            schema=Schema(
                label="label", dense=tuple(self._sizes.dense_names), categorical=tuple(fields)
            ),
            inputs=plain(self._sizes.dense_names, self._sizes.names),
            storage=plan.resolve(self._embeddings),
            bytes={"tables": sum(value.nbytes for value in tables.values())},
            trained={},
            test={},
            files={name: File.of(folder / name) for name in (JOB, LOWERING, TABLES, DENSE)},
            layers="int8" if layers else "fp32",
        )
        (folder / MANIFEST).write_text(to_json(dataclasses.asdict(artifact)), encoding="utf-8")

    def _rounded(self, embeddings: nn.Module, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what `export --layers int8` writes of the layers."""
        model = self._dcn(embeddings).eval()
        model.load_state_dict(dense, strict=False)
        shape = Shape(features=len(self._sizes.names), rows=sum(self._sizes.tables))
        shape = dataclasses.replace(shape, dense=self._sizes.dense, batch=1024)
        round_layers(model, ((r.dense, self._keyed(r)) for r in random_batches(shape)))
        return {n: w for n, w in model.state_dict().items() if not n.startswith(EMBEDDINGS)}


@contextmanager
def contestant(name: str, sizes: Sizes, seed: int) -> Iterator[Keyed]:
    """Holds a contestant and the process group that its tables need."""
    with quiet_process_group():
        yield Keyed(name, sizes, seed)
