"""A training step and a scored batch, stage by stage, and what each stage moves or computes."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from benchmarks.case import Case, Figures, Shape
from benchmarks.clock import Stages
from benchmarks.embedding import CYCLES
from benchmarks.tables import CPU, Batches, build, configs, names, policy, quiet_process_group
from recsys_compress.compress import CompressedEmbeddingBagCollection
from recsys_compress.compress.policy import PolicyPhase
from recsys_compress.compress.storage import StoragePlan, quantize
from recsys_compress.config import DataConfig, Job, ModelConfig, TrainConfig
from recsys_compress.data.batch import Batch
from recsys_compress.data.encode import FieldEncoder, VocabularyEncoder
from recsys_compress.data.inputs import plain
from recsys_compress.data.schema import NUM_RESERVED_IDS, CategoricalField, Schema
from recsys_compress.models import build_model
from recsys_compress.ranks import Ranks
from recsys_compress.serve import rows as raw
from recsys_compress.serve.artifact import Artifact
from recsys_compress.serve.predictor import Predictor
from recsys_compress.train.build import Built
from recsys_compress.train.optim import Optimizers
from recsys_compress.train.step import Learner

IDS, LOOK_UP, COMBINE, FORWARD = "ids", "look-up", "combine", "dense forward"
BACKWARD, COMBINE_BACK, TABLES = "dense backward", "combine backward", "tables backward and update"
UPDATE, SEARCH, HOOK, OTHER = "dense update", "search", "method's hook", "other"
TRAINING = (IDS, LOOK_UP, COMBINE, FORWARD, BACKWARD, COMBINE_BACK, TABLES, UPDATE, SEARCH, HOOK)
COLUMNS, ENCODE = "columns", "encode"
SERVING = (COLUMNS, ENCODE, IDS, LOOK_UP, COMBINE, FORWARD)
_COPIED = 1 << 26  # values of the tensor that is copied to find the bandwidth


class Marks:
    """Books the CPU time since the last mark to the stage that ends."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = {}
        self.quiet = False
        self._last = 0.0
        self._spent: dict[str, float] = {}

    def start(self) -> None:
        """Begins a step."""
        self._spent = {}
        self._last = time.process_time()

    def end(self, stage: str) -> None:
        """Ends a stage, which may come several times a step."""
        if self.quiet:
            return
        now = time.process_time()
        self._spent[stage] = self._spent.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now

    def close(self) -> None:
        """Ends a step."""
        self.end(OTHER)
        for stage, spent in self._spent.items():
            self.stages.setdefault(stage, []).append(spent)

    def figures(self, skip: int) -> Figures:
        """Returns the median milliseconds by stage; of rare work the mean."""
        return {
            stage: (statistics.mean if stage == HOOK else statistics.median)(spent[skip:])
            for stage, spent in self.stages.items()
        }

    def around(
        self, owner: Any, name: str, stage: str, *, before: str = OTHER, quiet: bool = False
    ) -> None:
        """Ends a stage whenever a method returns.

        Args:
            owner: of the method.
            name: of the method.
            stage: that it is.
            before: that ends when it is called.
            quiet: whether stages within it do not count.
        """
        method = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            self.end(before)
            self.quiet = self.quiet or quiet
            found = method(*arguments, **keywords)
            self.quiet = self.quiet and not quiet
            self.end(stage)
            return found

        setattr(owner, name, timed)

    def watch(self, model: Any) -> dict[str, float]:
        """Ends stages of a model's passes; returns counts of the look-ups, filled as they come."""
        counts: dict[str, float] = {}
        embeddings = model.embeddings

        def looked_up(_module: nn.Module, _inputs: Any, lookups: Any) -> None:
            self.end(IDS)
            counts["rows read"] = float(lookups.values().numel())
            sizes = (t.numel() * t.element_size() for t in (lookups.values(), lookups.lengths()))
            counts["bytes of ids"] = float(sum(sizes))

        def pooled(_module: nn.Module, inputs: Any) -> None:
            self.end(LOOK_UP)
            counts["values looked up"] = float(sum(values.numel() for _, values in inputs[0]))
            for _, values in inputs[0]:
                # Without anything that combines them, these are the vectors themselves.
                if values.requires_grad and len(embeddings.output.combines):
                    values.register_hook(lambda _gradient: self.end(COMBINE_BACK))

        def combined(_module: nn.Module, _inputs: Any, vectors: Any) -> None:
            self.end(COMBINE)
            if vectors.values().requires_grad:
                vectors.values().register_hook(lambda _gradient: self.end(BACKWARD))

        embeddings.ids.register_forward_pre_hook(lambda *_: self.end(OTHER))
        embeddings.ids.register_forward_hook(looked_up)
        embeddings.output.register_forward_pre_hook(pooled)
        embeddings.output.register_forward_hook(combined)
        model.register_forward_hook(lambda *_: self.end(FORWARD))
        return counts


def measure(case: Case) -> Figures:
    """Returns CPU milliseconds by stage on one thread, counts, and the machine's limits.

    Names are "train METHOD" and "serve METHOD TYPE".
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, *rest = case.name.split()
    with quiet_process_group():
        if kind == "train":
            return _training(case.shape, " ".join(rest))
        return _serving(case.shape, *rest)


def _training(shape: Shape, name: str) -> Figures:
    model = build(shape, name, lambda e: build_model(ModelConfig(), e, shape.dense))
    embeddings = model.module.embeddings
    job = Job(data=DataConfig(path=""), train=TrainConfig(batch_size=shape.batch))
    built = Built(
        job=job,
        policy=policy(shape, name),
        embeddings=embeddings,
        model=model,
        optimizers=Optimizers(model, embeddings, job.train),
        device=CPU,
    )
    embeddings.bind_hooks(built.live)
    search = name.endswith("search")
    phase = PolicyPhase(
        name="", policy=built.policy, epochs=None, rate=1.0, freeze_model=search, search=search
    )
    made = list(_batches(shape))
    marks = Marks()
    counts = marks.watch(model.module)
    marks.around(built.optimizers, "step", UPDATE, before=TABLES)
    hooks = embeddings.hooks()
    for hook in hooks:
        marks.around(hook, "on_step", HOOK)
        if search:
            marks.around(hook, "search", SEARCH, quiet=True)
    learner = Learner(built, phase, Ranks(), iter(made * 1000))
    steps = shape.warmup + CYCLES.get(name, shape.steps)
    for number in range(steps):
        marks.start()
        learner.step(made[number % len(made)], number / 1000, (number + 1) / 1000)
        marks.close()
    (table,) = embeddings.merged_tables()
    learned = sum(p.numel() for p in built.optimizers.dense_parameters)
    return (
        marks.figures(shape.warmup)
        | counts
        | {"dense parameters": float(learned), "row bytes": table.stored_dim * 4.0}
        | _dense_work(model.module, shape)
        | _limits(shape, table.num_embeddings, table.stored_dim)
    )


def _serving(shape: Shape, name: str, data_type: Any) -> Figures:
    collection = CompressedEmbeddingBagCollection(tables=configs(shape), policy=policy(shape, name))
    served = quantize(collection, StoragePlan(types=data_type))
    model = build_model(ModelConfig(), served, shape.dense)
    # The largest stands for all where blocks of ids have tables of several widths.
    stored = max((t.weight for t in served.tables.values()), key=Tensor.numel)
    del collection
    dense = tuple(f"number_{number}" for number in range(shape.dense))
    fields = tuple(
        CategoricalField(name=feature, num_embeddings=shape.rows_per_table)
        for feature in names(shape)
    )
    values = torch.randperm(shape.rows_per_table - NUM_RESERVED_IDS)
    encoders: dict[str, FieldEncoder] = {
        field.name: VocabularyEncoder.of(pa.array(values.numpy())) for field in fields
    }
    artifact = Artifact(
        format=1,
        hash_version=1,
        run="",
        dataset="",
        method=name,
        schema=Schema(label="", dense=dense, categorical=fields),
        inputs=plain(dense, [field.name for field in fields]),
        storage={},
        bytes={},
        trained={},
        test={},
        files={},
    )
    predictor = Predictor(artifact, model, encoders)
    tables = [_raw(shape, dense, len(values)) for _ in range(4)]
    marks = Marks()
    counts = marks.watch(model)
    for number in range(shape.warmup + shape.steps):
        marks.start()
        found = raw.features(tables[number % 4], artifact.inputs, "rows")
        marks.end(COLUMNS)
        tensors = raw.tensors(found, artifact.schema, encoders)
        marks.end(ENCODE)
        predictor.predict_tensors(*tensors)
        marks.close()
    rows, row_bytes = len(stored), stored.shape[1] * stored.element_size()
    return (
        marks.figures(shape.warmup)
        | counts
        | {"row bytes": float(row_bytes)}
        | _dense_work(model, shape)
        | _limits(shape, rows, -(-row_bytes // 4))
    )


def _batches(shape: Shape, count: int = 8) -> Iterator[Batch]:
    """Yields batches of uniform ids."""
    sparse = Batches(shape, zipf=0.0, count=count)
    for number in range(count):
        yield Batch(
            dense=torch.randn(shape.batch, shape.dense),
            sparse=sparse.keyed(number),
            labels=(torch.rand(shape.batch) < 0.3).float(),
        )


def _raw(shape: Shape, dense: tuple[str, ...], values: int) -> pa.Table:
    """Returns a batch as it comes to a scorer: numbers, and ids before any vocabulary."""
    columns = {name: pa.array(torch.randn(shape.batch).numpy()) for name in dense}
    ids = {n: pa.array(torch.randint(values, (shape.batch,)).numpy()) for n in names(shape)}
    return pa.table(columns | ids)


def _dense_work(model: Any, shape: Shape) -> Figures:
    """Returns the multiplications and additions of the dense part's forward pass."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return {"flops": 2.0 * shape.batch * sum(m.weight.numel() for m in layers)}


def _limits(shape: Shape, rows: int, width: int) -> Figures:
    """Returns what plain operations reach here: copying, reading random rows, multiplying.

    Args:
        shape: the workload.
        rows: of a table of the size of the case's.
        width: of its rows, in fp32 values.
    """
    source = torch.ones(min(_COPIED, shape.rows * shape.dim))
    target = torch.empty_like(source)
    table, count = torch.rand(rows, width), shape.features * shape.batch
    ids = iter([torch.randint(rows, (count,)) for _ in range(shape.warmup + shape.steps)])
    x = torch.rand(shape.batch, shape.features * shape.dim)
    square = torch.rand(x.shape[1], x.shape[1])
    work: dict[str, Callable[[], Tensor]] = {
        "copy": lambda: target.copy_(source),
        "gather": lambda: embedding(next(ids), table),
        "product": lambda: torch.mm(x, square),
    }
    stages = Stages()
    with torch.no_grad():
        for _ in range(shape.warmup + shape.steps):
            for name, call in work.items():
                with stages.stage(name):
                    call()
    spent = stages.medians(shape.warmup)
    return {
        "bytes per ms": 2 * source.numel() * 4 / spent["copy"],
        "rows per ms": count / spent["gather"],
        "flops per ms": 2.0 * x.numel() * square.shape[1] / spent["product"],
    }
