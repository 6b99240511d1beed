"""Compression of a trained model: another way to store its tables and layers, then fine-tuning."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_compress.byte_sizes import budget_bytes
from recsys_compress.compress.collection import CompressedEmbeddingBagCollection
from recsys_compress.compress.damage import measure
from recsys_compress.compress.method import method_class
from recsys_compress.compress.moments import Moments
from recsys_compress.compress.policy import Assignment, Policy, resolve
from recsys_compress.compress.size import DataType
from recsys_compress.compress.spectrum import Item, Spectrum, layer_item
from recsys_compress.compress.storage import StoragePlan, quantize
from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.errors import UserError
from recsys_compress.files import atomic_file
from recsys_compress.models.factorized import candidates, factors
from recsys_compress.models.quantized import LayerType, round_layers
from recsys_compress.ranks import Ranks
from recsys_compress.runtime import flush_denormals
from recsys_compress.train.best import load_best
from recsys_compress.train.build import EMBEDDINGS, Built, build, logical_tables
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.events import Metrics
from recsys_compress.train.folder import TABLES, read_policy, read_result, run_job
from recsys_compress.train.handover import Start, check_ids, check_tables, hand_over, table_moments
from recsys_compress.train.shard import process_group

# Training rows on which it is measured what cutting a table or layer would cost, and what goes
# into a layer.
_MEASURED_BATCH, _MEASURED_BATCHES = 8192, 16


def load_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[Built, PreparedDataset]:
    """Returns a run's model with the weights it kept; call it inside a process group.

    Args:
        folder: the run's own folder.
        overrides: keys of its job set otherwise, as `train --set` takes them.

    Raises:
        UserError: the folder is no finished run, a file is damaged, or the data is another.
    """
    flush_denormals()
    job = run_job(folder, overrides)
    dataset = PreparedDataset.open(job.data.path)
    if (known := read_result(folder).get("dataset")) and known != dataset.checksum:
        raise UserError(  # rows of compressed tables would be read as those of other ids
            f"data.path = {job.data.path!r}: is other data than the run {folder} was trained on; "
            "name that"
        )
    built = build(job, dataset.schema, read_policy(folder))
    load_best(built, folder)
    built.model.eval()
    return built, dataset


def compress(
    folder: Path, method: str, budget: str | int | None, overrides: Sequence[str] = ()
) -> tuple[Job, Start]:
    """Returns the job that fine-tunes a run's model under another method, and its start.

    Args:
        folder: the run's own folder.
        method: name of the method that takes the tables over.
        budget: bytes, as in a job; of tables and model together where the method factorizes layers
            too (`Method.whole_model`), else of the tables. None leaves the method's own knobs.
        overrides: keys of the job set otherwise.

    Raises:
        UserError: the run cannot be read, or the method cannot take its tables over.
    """
    with process_group():
        built, dataset = load_run(folder)
        job = run_job(folder, overrides)
        # What a plan says is what the trained tables are, not what they become.
        embedding = dataclasses.replace(job.embedding, method=method, budget=budget, plan=None)
        if budget is not None:  # ranks that were found before are of another size
            knobs = {k: v for k, v in embedding.methods.get(method, {}).items() if k != "rank"}
            methods = {**embedding.methods, method: knobs}
            embedding = dataclasses.replace(embedding, methods=methods)
        job = dataclasses.replace(
            job,
            embedding=embedding,
            tracking=dataclasses.replace(job.tracking, run_name=None),
        )
        wanted = PreparedDataset.open(job.data.path)
        tables = logical_tables(wanted.schema, embedding.dim)
        check_tables(tables, logical_tables(dataset.schema, built.job.embedding.dim), folder)
        check_ids(wanted, dataset, folder)
        if budget is not None and method_class(method).whole_model:
            moments = layer_moments(built, dataset)
            spectra = {name: Spectrum.of(found) for name, found in moments.items()}
            spectra |= {t.name: Spectrum.of(table_moments(built, dataset, t.name)) for t in tables}
            losses = _losses(built, dataset, spectra)
            layers, policy = _whole_model(job, built, tables, spectra, losses, budget)
            start = hand_over(built, dataset, tables, policy, layers, losses)
            start = _factorized(start, job, built, spectra)
            # The ranks that were found say it all: the job trains the same form from scratch too.
            knobs = dataclasses.asdict(start.policy.default.method)
            found = {method: {k: v for k, v in knobs.items() if v is not None}}
            embedding = dataclasses.replace(
                embedding, budget=None, methods={**embedding.methods, **found}
            )
        else:
            policy = resolve(embedding, tables)
            start = hand_over(built, dataset, tables, policy)
    ranks = {**job.model.ranks, **start.layers}
    job = dataclasses.replace(
        job, embedding=embedding, model=dataclasses.replace(job.model, ranks=ranks)
    )
    return job, dataclasses.replace(start, tags={"parent.folder": str(folder)})


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A run's model with its tables in another storage type.

    Attributes:
        folder: the run's own folder.
        types: storage type by table.
        bytes: "tables" (all that is served of the embeddings) and "model" (with the dense part).
        before: figures on the test split as trained; empty where the run has none.
        test: figures on the test split as stored.
    """

    folder: Path
    types: dict[str, DataType]
    bytes: Metrics
    before: Metrics
    test: Metrics

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {**self.__dict__, "folder": str(self.folder)}


def store(folder: Path, plan: StoragePlan | None) -> Stored:
    """Stores a run's tables in other types, in the run's folder, and evaluates the model with them.

    Args:
        folder: the run's own folder.
        plan: which types; None for those that the run's job or plan names.

    Raises:
        UserError: the run cannot be read, or the plan does not suit its tables.
    """
    with process_group() as ranks:
        if ranks.size > 1:
            raise UserError("compress --storage: is the work of one process; start it alone")
        built, dataset = load_run(folder)
        served = serving_form(folder, built, dataset, plan)
        kinds = sorted(set(served.stored.types.values()))
        with atomic_file(folder / TABLES.format("-".join(kinds))) as path:
            save_file(served.tables, path)
        return served.stored


@dataclass(frozen=True, kw_only=True)
class ServingForm:
    """A model as it is served.

    Attributes:
        tables: the tensors of its embeddings, by names within them.
        dense: all others, by names within the model.
        stored: its figures.
    """

    tables: dict[str, Tensor]
    dense: dict[str, Tensor]
    stored: Stored


def serving_form(
    folder: Path,
    built: Built,
    dataset: PreparedDataset,
    plan: StoragePlan | None,
    layers: LayerType = "fp32",
) -> ServingForm:
    """Stores a model's tables and layers in other types and evaluates it on the test split.

    Args:
        folder: the run's own folder.
        built: its model; its tables and layers give way to the stored ones.
        dataset: its data.
        plan: which types; None for those that the run's job or plan names.
        layers: type of the linear layers.

    Raises:
        UserError: the plan does not suit the tables.
    """
    plan = plan or StoragePlan.planned(built.embeddings)
    types = plan.resolve(built.embeddings)
    embeddings = quantize(built.embeddings, plan, built.table_weights())
    tables = {name: value.contiguous() for name, value in embeddings.state_dict().items()}
    served = sum(value.nbytes for value in tables.values())
    model = built.model.module
    model.embeddings = embeddings
    cpu = torch.device("cpu")  # where it is served
    model.to(cpu)
    if layers == "int8":
        round_layers(model, _some_training_rows(dataset, cpu))
    dense = {
        name: weight.detach().cpu().contiguous()
        for name, weight in model.state_dict().items()
        if not name.startswith(EMBEDDINGS)
    }
    reader = Reader(dataset, "test", batch_size=built.job.train.eval_batch_size)
    return ServingForm(
        tables=tables,
        dense=dense,
        stored=Stored(
            folder=folder,
            types=types,
            bytes={"tables": served, "model": served + sum(w.nbytes for w in dense.values())},
            before=read_result(folder).get("test", {}),
            test=evaluate(model, reader, cpu).compute(),
        ),
    )


def layer_moments(built: Built, dataset: PreparedDataset) -> dict[str, Moments]:
    """Returns the moments of the outputs of a model's layers over the training split, in a pass."""
    moments: dict[str, Moments] = {}
    handles, rows = [], [0]
    for name, layer in candidates(built.model.module).items():
        moments[name] = Moments.zeros(layer.out_features)
        handles.append(layer.register_forward_hook(functools.partial(_count, moments[name], rows)))
    ranks = Ranks.current()
    reader = Reader(
        dataset,
        "train",
        batch_size=built.job.train.eval_batch_size,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    built.model.eval()
    with torch.no_grad():
        for batch in reader.epoch(0):
            rows[0] = len(batch)
            on_device = batch.to(built.device)
            built.model(on_device.dense, on_device.sparse)
    for handle in handles:
        handle.remove()
    for found in moments.values():
        found.over(ranks)
    return moments


def _losses(
    built: Built, dataset: PreparedDataset, spectra: Mapping[str, Spectrum]
) -> dict[str, Tensor]:
    """Returns what cutting each table and layer would cost in logloss, on some training rows."""
    model = built.model.module
    return measure(
        model,
        model.embeddings,
        candidates(model),
        spectra,
        _some_training_rows(dataset, built.device),
    )


def _some_training_rows(
    dataset: PreparedDataset, device: torch.device
) -> Iterator[tuple[Tensor, KeyedJaggedTensor]]:
    """Yields dense features and ids of some rows, always the same."""
    reader = Reader(dataset, "train", batch_size=_MEASURED_BATCH, seed=0, shuffle=True)
    for batch in itertools.islice(reader.epoch(0), _MEASURED_BATCHES):
        on_device = batch.to(device)
        yield on_device.dense, on_device.sparse


def _count(
    moments: Moments, rows: list[int], _layer: nn.Module, _inputs: object, output: Tensor
) -> None:
    moments.add(output[: rows[0]].flatten(0, -2))  # what fills a batch up does not count


def _whole_model(
    job: Job,
    built: Built,
    tables: Sequence[EmbeddingBagConfig],
    spectra: Mapping[str, Spectrum],
    losses: Mapping[str, Tensor],
    budget: str | int,
) -> tuple[list[Item], Policy]:
    """Returns the layers as items, and the policy with what is left for them and the tables."""
    layers = candidates(built.model.module)
    activation = job.model.between == "activation"
    items = [
        layer_item(name, layer, spectra[name], activation=activation, lost=losses[name])
        for name, layer in layers.items()
    ]
    whole = sum(weight.nbytes for weight in built.weights().values())
    dense = sum(weight.nbytes for weight in built.dense_weights().values())
    fixed = dense - sum(item.sizes[-1] for item in items)
    embedding = job.embedding
    policy = Policy.from_config(dataclasses.replace(embedding, budget=None))
    fixed += sum(
        _bytes(assignment)
        for assignment in policy.assign(tables)
        if assignment.rule is not policy.default
    )
    left = budget_bytes(budget, whole) - fixed
    return items, dataclasses.replace(
        policy, default=dataclasses.replace(policy.default, budget_bytes=left)
    )


def _bytes(assignment: Assignment) -> int:
    """Returns the bytes of the tables that a rule stores."""
    meta = torch.device("meta")
    own = Policy(default=dataclasses.replace(assignment.rule, table=None))
    collection = CompressedEmbeddingBagCollection(
        tables=assignment.tables, policy=own, device=meta, fused_device=meta
    )
    return collection.size_report().table_bytes


def _factorized(start: Start, job: Job, built: Built, spectra: Mapping[str, Spectrum]) -> Start:
    """Returns the start with the factors of its layers in the place of their weights."""
    layers = candidates(built.model.module)
    activation = job.model.between == "activation"
    model = dict(start.model)
    for name, rank in start.layers.items():
        spectrum = spectra[name]
        state = factors(layers[name], spectrum.mean, spectrum.basis(rank), activation=activation)
        for key in ("weight", "bias"):
            model.pop(f"{name}.{key}", None)
        model |= {f"{name}.{key}": value for key, value in state.items()}
    return dataclasses.replace(start, model=model)
