"""A finished run to the folder that is deployed."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.config import TrackingConfig, dump_job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.encode import kind
from recsys_compress.data.inputs import Inputs
from recsys_compress.data.schema import NUM_RESERVED_IDS
from recsys_compress.data.sources import SOURCES, make_source
from recsys_compress.errors import UserError
from recsys_compress.files import atomic_folder, to_json
from recsys_compress.models.quantized import LayerType
from recsys_compress.serve.artifact import (
    CARD,
    DENSE,
    FORMAT_VERSION,
    JOB,
    LOWERING,
    MANIFEST,
    TABLES,
    VOCABULARY,
    Artifact,
    File,
)
from recsys_compress.serve.card import model_card
from recsys_compress.train.folder import read_result
from recsys_compress.train.post import load_run, serving_form
from recsys_compress.train.shard import process_group


def export(
    folder: Path,
    out: Path,
    plan: StoragePlan | None,
    data: Path | None = None,
    layers: LayerType = "fp32",
) -> Artifact:
    """Writes a finished run's model as it is served to the new folder `out`, whole or not at all.

    The same run and plan give the same bytes.

    Args:
        folder: the run's own folder.
        out: folder that does not exist yet, or is empty.
        plan: in which types tables are stored.
        data: the prepared dataset, where it is no longer where the job says.
        layers: type in which linear layers are stored.

    Returns:
        What the artifact holds.

    Raises:
        UserError: the run is not finished or cannot be read, the plan does not suit its tables, or
            `out` cannot be written.
    """
    result = read_result(folder)
    if not result.get("test"):
        raise UserError(
            f"{folder}: is no finished run; finish it with recsys-compress train --resume {folder}"
        )
    overrides = ["train.device=cpu"]  # where it is served
    overrides += [] if data is None else [f"data.path={json.dumps(str(data.absolute()))}"]
    with process_group(), atomic_folder(out) as temporary:
        built, dataset = load_run(folder, overrides)
        served = serving_form(folder, built, dataset, plan, layers)
        for name, tensors in ((TABLES, served.tables), (DENSE, served.dense)):
            save_file(tensors, temporary / name)
            (temporary / name).chmod(0o644)  # else only its maker may read it
        inputs = _write_vocabularies(temporary, dataset)
        # Where it was tracked may hold a password, and says nothing to who loads the model.
        job = dataclasses.replace(built.job, tracking=TrackingConfig())
        (temporary / JOB).write_text(dump_job(job), encoding="utf-8")
        policy = built.policy.describe(built.embeddings.embedding_bag_configs())
        (temporary / LOWERING).write_text(json.dumps(policy, indent=2), encoding="utf-8")
        artifact = Artifact(
            format=FORMAT_VERSION,
            hash_version=dataset.manifest.hash_version,
            run=str(result["run_id"]),
            dataset=dataset.checksum,
            method=job.embedding.stored_by,
            schema=dataset.schema,
            inputs=inputs,
            storage=served.stored.types,
            layers=layers,
            bytes={name: int(size) for name, size in served.stored.bytes.items()},
            trained=result["test"],
            test=dict(served.stored.test),
            files=_files(temporary),
        )
        (temporary / CARD).write_text(model_card(artifact, result, policy), encoding="utf-8")
        artifact = dataclasses.replace(artifact, files=_files(temporary))
        text = to_json(dataclasses.asdict(artifact), indent=2)
        (temporary / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return artifact


def _files(folder: Path) -> dict[str, File]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): File.of(path) for path in paths}


def _write_vocabularies(folder: Path, dataset: PreparedDataset) -> Inputs:
    """Writes the values of each field with a vocabulary; returns the inputs with kinds of ids."""
    inputs = _inputs(dataset)
    kinds = {field.name: field.kind for field in inputs.ids}
    for field in dataset.schema.categorical:
        if field.encoding != "vocabulary":
            continue
        values = dataset.vocabulary(field.name).slice(NUM_RESERVED_IDS)
        kinds[field.name] = kinds[field.name] or kind(values.type)
        path = folder / VOCABULARY.format(field.name)
        path.parent.mkdir(exist_ok=True)
        pq.write_table(
            pa.table({"value": values}),
            path,
            compression="zstd",
            use_dictionary=False,  # values are distinct
            write_statistics=False,
            store_schema=True,
        )
    fields = (dataclasses.replace(field, kind=kinds[field.name]) for field in inputs.ids)
    return dataclasses.replace(inputs, ids=tuple(fields))


def _inputs(dataset: PreparedDataset) -> Inputs:
    """Returns what raw rows hold; datasets of earlier versions do not say, but their source does.

    Raises:
        UserError: the source cannot be asked any more.
    """
    manifest = dataset.manifest
    if manifest.inputs is not None:
        return manifest.inputs
    names = {field.name for field in dataclasses.fields(SOURCES[manifest.source])}
    options = {key: value for key, value in manifest.options.items() if key in names}
    try:
        return make_source(manifest.source, options).inputs()
    except UserError as error:
        raise UserError(
            f"{dataset.path}: does not say what its raw columns were, nor does its source any more "
            f"({error}); prepare it anew"
        ) from error
