"""The folder that is deployed.

```
artifact.json            what the model reads and how it is stored; size and SHA-256 of all files
job.toml                 the resolved job
lowering.json            how tables are stored, as `Policy.describe` has it
tables.safetensors       the embeddings as they are served, unpadded, in their storage types
dense.safetensors        all other weights: fp32, or linear layers in int8
vocabulary/FIELD.parquet raw values in the order of their ids, from id 2 on; none for hashed fields
README.md                the model card
```
No file holds code, and none is unpickled: an artifact from anywhere can be loaded.
"""

from dataclasses import dataclass
from pathlib import Path

from recsys_compress.compress.size import DataType
from recsys_compress.data.hashing import HASH_VERSION
from recsys_compress.data.inputs import Inputs
from recsys_compress.data.schema import Schema
from recsys_compress.errors import UserError
from recsys_compress.files import read_manifest, sha256
from recsys_compress.models.quantized import LayerType
from recsys_compress.settings import STRICT, parse

FORMAT_VERSION = 1
MANIFEST = "artifact.json"
JOB = "job.toml"
LOWERING = "lowering.json"
TABLES = "tables.safetensors"
DENSE = "dense.safetensors"
VOCABULARY = "vocabulary/{}.parquet"
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the artifact: its size, and the SHA-256 of its bytes in hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        """Describes a file."""
        return cls(bytes=path.stat().st_size, sha256=sha256(path))


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """The contents of `artifact.json`.

    Attributes:
        format: version of the folder's layout.
        hash_version: version of the hash of raw values.
        run: id of the run it comes from.
        dataset: checksum of the data that it was trained on.
        method: that stores the tables; "plan" for that of a plan.
        schema: the features.
        inputs: the raw columns that they are made of.
        storage: storage type of each merged table.
        bytes: "tables" and "model", of the tensors.
        trained: figures of the trained model on the test split.
        test: figures of this one, as stored.
        files: all other files, by path.
        layers: type of the linear layers; fp32 in artifacts that do not say.
    """

    __pydantic_config__ = STRICT

    format: int
    hash_version: int
    run: str
    dataset: str
    method: str
    schema: Schema
    inputs: Inputs
    storage: dict[str, DataType]
    bytes: dict[str, int]
    trained: dict[str, float | None]
    test: dict[str, float | None]
    files: dict[str, File]
    layers: LayerType = "fp32"

    @property
    def total_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())


def read_artifact(folder: Path, checksum: str | None = None) -> Artifact:
    """Reads what an artifact holds, and compares every file with its checksum.

    Args:
        folder: the artifact.
        checksum: SHA-256 of its `artifact.json`, where it is known from elsewhere.

    Raises:
        UserError: it is no artifact of this version, or a file is missing, changed or not its own.
    """
    path = folder / MANIFEST
    raw = read_manifest(
        path,
        FORMAT_VERSION,
        of="artifact",
        made_by="recsys-compress export",
        mend="export the model anew",
    )
    artifact = parse(Artifact, raw, where=str(path))
    if artifact.hash_version != HASH_VERSION:
        raise UserError(
            f"{path}: its ids were hashed by version {artifact.hash_version}, this one has "
            f"{HASH_VERSION}; serve it with the version of recsys-compress that made it"
        )
    if checksum is not None and sha256(path) != checksum:
        raise UserError(f"{path}: has been changed: its checksum is not {checksum[:12]}...")
    _verify(folder, artifact)
    return artifact


def _verify(folder: Path, artifact: Artifact) -> None:
    found = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if not file.is_dir() or file.is_symlink()
    }
    for name in sorted(found - {MANIFEST, *artifact.files}):
        raise UserError(f"{folder / name}: is not part of the artifact; export the model anew")
    for name, file in artifact.files.items():
        if name not in found:
            raise UserError(f"{folder / name}: is missing; export the model anew")
        if File.of(folder / name) != file:
            raise UserError(
                f"{folder / name}: has changed since it was written (checksum); "
                "export the model anew"
            )
