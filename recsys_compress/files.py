"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from recsys_compress.errors import UserError

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FullDiskError(UserError):
    """A file has no room; the cause is the error of the system."""


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on failure it goes.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    handle, name = _temporary(path, lambda: tempfile.mkstemp(dir=path.parent, prefix=_prefix(path)))
    os.close(handle)
    temporary = Path(name)
    try:
        with _writing(path):
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it becomes `path`, on failure it goes.

    `path` may exist only as an empty folder: nothing of the user's is ever overwritten.

    Raises:
        UserError: `path` exists and is not an empty folder, it or its parent cannot be written, or
            the disk is full.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; name a new one")
    if path.is_symlink():
        path = path.resolve()
    if os.path.ismount(path) or path.resolve() == Path.cwd():
        raise UserError(f"{path}: is in use as a folder; name a new one, within it for example")
    temporary = temporary_folder(path)
    try:
        with _writing(path):
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            for found in sorted(temporary.rglob("*"), reverse=True):
                sync(found)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder, made if need be, against other processes that would write into it.

    A file system without locks holds none off.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Else the one before has ended, and removed it, just now.
            held = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except (BlockingIOError, FileNotFoundError):
            held = False
        except OSError:
            held = True
        if not held:
            raise UserError(
                f"{folder}: another process is writing there; wait for it, or name another place"
            )
        yield
    finally:
        os.close(descriptor)


def temporary_folder(path: Path) -> Path:
    """Returns a new hidden folder beside `path`, to be filled and renamed to it.

    Raises:
        UserError: the parent cannot be written.
    """
    return Path(_temporary(path, lambda: tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path))))


def check_writable(path: Path) -> None:
    """Checks that a file can be made, before the work that it is to hold.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    handle, name = _temporary(path, lambda: tempfile.mkstemp(dir=path.parent, prefix=_prefix(path)))
    os.close(handle)
    Path(name).unlink()


def read_toml(path: Path, mend: str) -> dict[str, Any]:
    """Returns what a TOML file holds.

    Args:
        path: the file.
        mend: what the user can do where it cannot be read.

    Raises:
        UserError: it cannot be read or parsed.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise UserError(f"{path}: is not valid TOML: {error}") from error


def read_manifest(path: Path, version: int, *, of: str, made_by: str, mend: str) -> Any:
    """Returns what the JSON file that describes a folder holds.

    Args:
        path: the file.
        version: of its format.
        of: what the folder should be, for messages.
        made_by: the command that makes one.
        mend: what the user can do where the file is damaged, or another version's.

    Raises:
        UserError: it cannot be read or parsed, or has another format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path.parent}: is no {of} (no readable {path.name}); make one with `{made_by}`"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON; {mend}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != version:
        raise UserError(f"{path}: has format {found!r}, this version reads {version}; {mend}")
    return raw


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Returns plain data as JSON, with null for each number that JSON does not have."""
    return json.dumps(_finite(value), allow_nan=False, indent=indent)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _temporary(path: Path, make: Callable[[], T]) -> T:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return make()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); name a folder that can"
        ) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tells what only writing can meet: a full disk, or a file that may not be so large."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise FullDiskError(f"{path}: cannot be written ({error}); make room for it") from error
    except SafetensorError as error:
        raise FullDiskError(f"{path}: cannot be written ({error}); make room for it") from error


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
