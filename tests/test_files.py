import os
from pathlib import Path

import pytest

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
