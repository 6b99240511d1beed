"""The folder that is deployed: the same bytes each time, checked, and without code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.config import load_job
from recsys_compress.errors import UserError
from recsys_compress.files import sha256
from recsys_compress.serve.artifact import CARD, MANIFEST, File, read_artifact
from recsys_compress.serve.export import export
from recsys_compress.serve.predictor import Predictor
from recsys_compress.train.events import RunResult
from tests.serve.clicks import prepared


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def test_the_same_run_gives_the_same_bytes(
    clicks_run: RunResult, artifact: Path, tmp_path: Path
) -> None:
    export(clicks_run.folder, tmp_path / "again", StoragePlan(types="fp32"))
    assert sha256(tmp_path / "again" / MANIFEST) == sha256(artifact / MANIFEST)


def test_bytes_are_those_of_the_size_report(clicks_run: RunResult, artifact: Path) -> None:
    found = read_artifact(artifact)
    size = json.loads((clicks_run.folder / "size.json").read_text())
    assert found.bytes["tables"] == size["total"]["serving"]["fp32"]
    header = 2000
    assert 0 < found.files["tables.safetensors"].bytes - found.bytes["tables"] < header
    files = (path for path in artifact.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert sum(path.stat().st_size for path in files) == found.total_bytes


def test_what_it_says_of_itself(clicks_run: RunResult, artifact: Path) -> None:
    found = read_artifact(artifact)
    assert found.run == clicks_run.run_id
    assert found.trained == clicks_run.test
    assert {field.kind for field in found.inputs.ids} == {"integer", "string"}
    card = (artifact / CARD).read_text()
    assert f"{found.bytes['tables']:,}" in card
    assert "| `price` | numbers | counts as -1 |" in card
    assert "| `tags` | lists of strings, or text cut at `|`, weights in `tag_weights` |" in card
    assert load_job(artifact / "job.toml").tracking.uri is None


@pytest.mark.parametrize("name", ["tables.safetensors", "job.toml", "vocabulary/user.parquet"])
def test_a_changed_or_missing_file_is_refused(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: has changed since it was written"):
        Predictor.load(copy)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        Predictor.load(copy)


def test_a_manifest_made_to_fit_is_known_by_its_checksum(copy: Path, artifact: Path) -> None:
    (copy / CARD).write_text("other")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][CARD] = File.of(copy / CARD).__dict__
    (copy / MANIFEST).write_text(json.dumps(manifest))
    Predictor.load(copy)
    with pytest.raises(UserError, match="has been changed"):
        Predictor.load(copy, checksum=sha256(artifact / MANIFEST))


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.path, "boom"))


@pytest.mark.parametrize("name", ["tables.safetensors", "vocabulary/user.parquet", "model.pkl"])
def test_a_pickle_in_it_never_runs(copy: Path, tmp_path: Path, name: str) -> None:
    struck = tmp_path / "struck"
    bomb = pickle.dumps(Bomb(struck))
    (copy / name).write_bytes(bomb)
    manifest = json.loads((copy / MANIFEST).read_text())
    for listed in (False, True):
        if listed:
            manifest["files"][name] = File.of(copy / name).__dict__
            (copy / MANIFEST).write_text(json.dumps(manifest))
        if listed and name == "model.pkl":
            Predictor.load(copy)  # listed, but nothing reads it
        else:
            with pytest.raises(UserError):
                Predictor.load(copy)
    assert not struck.exists()
    pickle.loads(bomb)  # noqa: S301
    assert struck.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99, this version reads 1"),
        ({"hash_version": 0}, "its ids were hashed by version 0"),
        ({"odd": 1}, "unknown key 'odd'"),
    ],
)
def test_a_manifest_of_another_version(copy: Path, change: dict[str, int], message: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_text()) | change
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        read_artifact(copy)


def test_an_unfinished_run_and_a_folder_of_something_else(
    clicks_run: RunResult, tmp_path: Path
) -> None:
    copied = shutil.copytree(clicks_run.folder, tmp_path / "run")
    (copied / "result.json").unlink()
    with pytest.raises(UserError, match="is no finished run"):
        export(copied, tmp_path / "out", StoragePlan(types="fp32"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is no artifact"):
        Predictor.load(tmp_path)


def test_a_run_is_not_exported_with_other_data(clicks_run: RunResult, tmp_path: Path) -> None:
    other = prepared(tmp_path, seed=1)
    with pytest.raises(UserError, match=r"is other data than the run .* was trained on"):
        export(clicks_run.folder, tmp_path / "out", None, data=other.path)
    assert not (tmp_path / "out").exists()
