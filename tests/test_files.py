import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recsys_compress.errors import UserError
from recsys_compress.files import atomic_file, atomic_folder, sha256, write_text


def fail(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_text(path, "first")
    with pytest.raises(RuntimeError):
        fail(path)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def fail_within() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_within()
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").write_text("whole")
    assert (path / "deep" / "a").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as temporary:
        (temporary / "a").write_text("")
    with (
        pytest.raises(UserError, match="not an empty folder"),
        atomic_folder(tmp_path / "empty"),
    ):
        pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "file" / "below", "")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize("name", [".", "/"])
def test_a_folder_in_use_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = "exists and is not" if name == "/" else "is in use as a folder; name a new one"
    with pytest.raises(UserError, match=message), atomic_folder(Path(name)):
        raise AssertionError("before any work")


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "a").read_text() == "1"


@pytest.mark.parametrize(
    "fill",
    [
        lambda path: path.write_text("x" * 9999),
        lambda path: save_file({"x": torch.zeros(9999)}, path),
    ],
)
def test_a_full_disk_is_one_clear_error(fill: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("as it was")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(UserError, match="a: cannot be written"),
            atomic_file(tmp_path / "a") as t,
        ):
            fill(t)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "as it was"
