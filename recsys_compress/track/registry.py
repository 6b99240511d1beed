"""Finished runs as versions of a registered model, and versions as folders that can be loaded.

A version is made in one call, with all its tags, after its files are uploaded: what is killed
before leaves no version, what is killed after leaves one without the alias. Registering the same
run again finishes what is unfinished and makes nothing twice.
"""

import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, Schema, TensorSpec

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.data.encode import VocabularyEncoder
from recsys_compress.data.inputs import IdInput
from recsys_compress.errors import UserError
from recsys_compress.files import sha256
from recsys_compress.models.quantized import LayerType
from recsys_compress.serve import PACKAGES
from recsys_compress.serve.artifact import CARD, MANIFEST, Artifact, read_artifact
from recsys_compress.serve.export import export
from recsys_compress.serve.predictor import Predictor
from recsys_compress.serve.vectors import movement
from recsys_compress.track.client import connected
from recsys_compress.track.pyfunc import ARTIFACT, CODE
from recsys_compress.track.run import RUN_FILE
from recsys_compress.track.uri import shown, tracking_uri
from recsys_compress.train.folder import run_job

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
CHECKSUM = "artifact.sha256"  # tag: of the artifact's manifest, which has those of all its files
PLACE = "artifact.path"  # tag: of the model, in its run's artifacts

# What MLflow writes of a model as ours.
_FLAVOR = {
    *("artifacts", "cloudpickle_version", "code", "env", "loader_module", "model_code_path"),
    *("python_version", "streamable"),
}
_URI = "models:/"
_PACKAGES = (*PACKAGES, "mlflow", "pandas", "recsys-compress")
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow says either of an alias


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version that a run has become.

    Attributes:
        name: of the registered model.
        version: its number.
        created: whether it is new; the same artifact is registered only once.
        tags: of the version.
    """

    name: str
    version: str
    created: bool
    tags: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return asdict(self)


def register(
    folder: Path,
    plan: StoragePlan | None,
    *,
    name: str | None = None,
    uri: str | None = None,
    data: Path | None = None,
    layers: LayerType = "fp32",
) -> Registered:
    """Makes a finished run's model a version of a registered model, with alias `challenger`.

    Args:
        folder: the run's own folder.
        plan: in which types its tables are stored.
        name: of the registered model; by default the job's experiment.
        uri: of MLflow; by default where the run was recorded.
        data: the prepared dataset, where it is no longer where the job says.
        layers: type in which linear layers are stored.

    Raises:
        UserError: the run is not finished, or MLflow cannot be reached, has no such run or refuses.
    """
    job = run_job(folder)
    name, uri = name or job.tracking.experiment, uri or tracking_uri(job)
    with connected(uri) as client, tempfile.TemporaryDirectory() as temporary:
        run_id = _run_id(client, folder, uri)
        out = Path(temporary) / ARTIFACT
        artifact = export(folder, out, plan, data, layers)
        checksum = sha256(out / MANIFEST)
        version = before = _first(client, name, checksum)
        if version is None:
            dataset = str((data or Path(job.data.path)).absolute())
            made = _create(client, name, run_id, out, artifact, dataset)
            version = _first(client, name, checksum) or made
            if int(version.version) != int(made.version):  # another process has made one meanwhile
                client.delete_model_version(name, made.version)
        client.set_registered_model_alias(name, CHALLENGER, version.version)
        return Registered(
            name=name,
            version=str(version.version),
            created=before is None,
            tags=dict(version.tags),
        )


def alias(client: MlflowClient, name: str, which: str) -> ModelVersion | None:
    """Returns the version that an alias names, if there is one."""
    try:
        return client.get_model_version_by_alias(name, which)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        return None


def fetch(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Downloads the artifact of a version; returns its folder.

    Raises:
        UserError: the version was not made by `register`.
    """
    place = f"{_tag(version, PLACE)}/artifacts/{ARTIFACT}"
    return Path(client.download_artifacts(str(version.run_id), place, str(folder)))


def load(client: MlflowClient, version: ModelVersion) -> Predictor:
    """Returns a version's model, its files compared with the checksum that the registry has.

    Raises:
        UserError: the artifact has been changed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(client, version, Path(temporary))
        return Predictor.load(folder, checksum=_tag(version, CHECKSUM))


@contextlib.contextmanager
def located(model: str, uri: str) -> Iterator[Path]:
    """Yields the folder of the artifact that `models:/NAME@ALIAS` names, for as long as needed.

    Raises:
        UserError: there is no such version, or its artifact has been changed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        with connected(uri) as client:
            version = named(client, model)
            folder = fetch(client, version, Path(temporary))
        read_artifact(folder, _tag(version, CHECKSUM))
        yield folder


def named(client: MlflowClient, model: str) -> ModelVersion:
    """Returns the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names.

    Raises:
        UserError: there is none.
    """
    rest = model.removeprefix(_URI)
    name, at, which = rest.rpartition("@") if "@" in rest else rest.rpartition("/")
    if not name or not which:
        raise UserError(f"model {model!r}: write it like models:/NAME@champion or models:/NAME/3")
    if at == "@":
        found = alias(client, name, which)
        if found is None:
            raise UserError(f"model {name!r}: has no version with alias {which!r}; register one")
        return found
    try:
        return client.get_model_version(name, which)
    except MlflowException as error:
        raise UserError(f"model {name!r}: has no version {which!r}") from error


def fetch_model(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Downloads a version as MLflow serves it; returns its folder.

    MLflow runs the code that a model names, so it must be this package's own and nothing else.

    Raises:
        UserError: the artifact has been changed, or the model names other code.
    """
    model = Path(client.download_artifacts(str(version.run_id), _tag(version, PLACE), str(folder)))
    flavor = Model.load(str(model)).flavors.get("python_function", {})
    code = model / Path(str(flavor.get("model_code_path"))).name
    parts = {name: part.get("path") for name, part in (flavor.get("artifacts") or {}).items()}
    if (
        flavor.get("loader_module") != "mlflow.pyfunc.loaders.code_model"
        or flavor.get("code")
        # Others, like `data`, name further folders whose code and files MLflow would load.
        or not flavor.keys() <= _FLAVOR
        or parts != {ARTIFACT: f"artifacts/{ARTIFACT}"}
        or not code.is_file()
        or code.read_bytes() != CODE.read_bytes()
    ):
        raise UserError(
            f"model {version.name!r}, version {version.version}: its code is not that of this "
            "version of recsys-compress; register it anew"
        )
    read_artifact(model / "artifacts" / ARTIFACT, _tag(version, CHECKSUM))
    return model


def _tag(version: ModelVersion, name: str) -> str:
    if name not in version.tags:
        raise UserError(
            f"model {version.name!r}, version {version.version}: has no tag {name!r}; only what "
            "recsys-compress registered can be loaded"
        )
    return str(version.tags[name])


def _run_id(client: MlflowClient, folder: Path, uri: str) -> str:
    """Returns the MLflow run in which a run was recorded."""
    path = folder / RUN_FILE
    try:
        run_id = str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: names no MLflow run; train the model anew") from error
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"MLflow at {shown(uri)!r}: has no run {run_id}, as which {folder} was recorded; name "
            "its server with --uri or MLFLOW_TRACKING_URI"
        ) from error
    return run_id


def _first(client: MlflowClient, name: str, checksum: str) -> ModelVersion | None:
    """Returns the first version of an artifact, if there is one."""
    known = client.search_model_versions(f"name = '{name}'")
    own = [version for version in known if version.tags.get(CHECKSUM) == checksum]
    return min(own, key=lambda version: int(version.version), default=None)


def _create(
    client: MlflowClient, name: str, run_id: str, out: Path, artifact: Artifact, dataset: str
) -> ModelVersion:
    """Uploads an artifact as a model from code, and makes it a version."""
    with contextlib.suppress(MlflowException):
        client.create_registered_model(name)
    client.get_registered_model(name)  # says what is wrong where it could not be made
    predictor = Predictor.load(out)
    champion = alias(client, name, CHAMPION)
    checksum = sha256(out / MANIFEST)
    place = f"model-{checksum[:12]}"
    tags = {CHECKSUM: checksum, PLACE: place, **_tags(artifact, dataset)}
    if champion is not None:
        tags |= {"parent.version": str(champion.version)}
        tags |= _moved(load(client, champion), predictor)
    model = out.with_name(place)
    with warnings.catch_warnings():
        # pandas says so of how MLflow looks at the example's columns.
        warnings.filterwarnings("ignore", "Operation with range is deprecated")
        mlflow.pyfunc.save_model(
            str(model),
            python_model=str(CODE),
            artifacts={ARTIFACT: str(out)},
            signature=_signature(artifact),
            input_example=_example(predictor),
            pip_requirements=[f"{package}=={metadata.version(package)}" for package in _PACKAGES],
        )
    client.log_artifacts(run_id, str(model), place)
    return client.create_model_version(
        name,
        f"runs:/{run_id}/{place}",
        run_id,
        tags=tags,
        description=(out / CARD).read_text(encoding="utf-8"),
    )


def _tags(artifact: Artifact, dataset: str) -> dict[str, str]:
    """Returns size, quality and lineage."""
    figures = {
        f"{part}.{name}": values[name]
        for part, values in (("trained", artifact.trained), ("test", artifact.test))
        for name in ("auc", "logloss", "calibration")
    }
    return {
        "run.id": artifact.run,
        "dataset.checksum": artifact.dataset,
        "dataset.path": dataset,
        "method": artifact.method,
        "storage": ",".join(sorted(set(artifact.storage.values()))),
        "layers": artifact.layers,
        "bytes.tables": str(artifact.bytes["tables"]),
        "bytes.model": str(artifact.bytes["model"]),
        "bytes.artifact": str(artifact.total_bytes),
        **{name: f"{value:.8f}" for name, value in figures.items() if value is not None},
    }


def _moved(before: Predictor, after: Predictor) -> dict[str, str]:
    """Returns how far each field's vectors moved from the champion's."""
    tags = {}
    for field in after.encoders:
        found = movement(before, after, field)
        name = re.sub(r"[^\w\-. ]", "_", field)  # MLflow takes no other characters in a tag's name
        for figure, value in asdict(found).items() if found else ():
            if value is not None:
                tags[f"vectors.{name}.{figure}"] = f"{value:.6g}"
    return tags


def _signature(artifact: Artifact) -> ModelSignature:
    """Returns the columns; those of ids are "any", and checked by the predictor.

    With a type of their own MLflow would refuse a missing integer, which pandas makes a float, and
    in some forms of a request read a missing text as "None".
    """
    unchecked = AnyType()  # type: ignore[no-untyped-call]
    columns = {d.name: ColSpec(DataType.double, d.name) for d in artifact.inputs.dense}
    for field in artifact.inputs.ids:
        columns |= {column: ColSpec(unchecked, column) for column in field.columns()}
    inputs: list[ColSpec | TensorSpec] = list(columns.values())
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(DataType.float)]))


def _example(predictor: Predictor) -> pd.DataFrame:
    """Returns two rows: of each field the most frequent values."""
    rows = 2
    columns: dict[str, list[Any]] = {d.name: [0.0] * rows for d in predictor.artifact.inputs.dense}
    for field in predictor.artifact.inputs.ids:
        values = _values(predictor, field, rows)
        columns[field.column] = [[v] for v in values] if field.multi_valued else values
        if field.weights is not None:
            columns[field.weights] = [[1.0]] * rows
    return pd.DataFrame(columns)


def _values(predictor: Predictor, field: IdInput, count: int) -> list[Any]:
    if field.part is not None:
        return ["2026-01-05 12:00:00"] * count
    encoder = predictor.encoders[field.name]
    known = encoder.values[:count].to_pylist() if isinstance(encoder, VocabularyEncoder) else []
    known = known or ["a" if field.kind == "string" else 1]
    return [known[i % len(known)] for i in range(count)]
