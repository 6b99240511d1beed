"""Checkpoints: tensors as safetensors, the rest as JSON, whole or absent.

In torch's distributed checkpoints each process writes its part, and more or fewer processes can
read it. Nothing in ours is pickled.
"""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from recsys_compress.errors import UserError
from recsys_compress.files import sha256, sync, temporary_folder
from recsys_compress.ranks import Ranks

STATE = "state.json"
KEPT = 2
_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A moment of training that was written.

    Attributes:
        path: its folder.
        state: plain data.
    """

    path: Path
    state: dict[str, Any]

    def load(self, state: dict[str, Any]) -> None:
        """Overwrites tensors in place, sharded ones by this process's part.

        Args:
            state: by the names under which they were saved.
        """
        reader = HuggingFaceStorageReader(str(self.path))
        with warnings.catch_warnings():
            # Every process reads what it needs; no word with the others is wanted.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=reader, no_dist=True)

    def read(self, wanted: Callable[[str], bool] = lambda _name: True) -> dict[str, Tensor]:
        """Returns the tensors with such names, whole."""
        found = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
            for name, entry in found.items()
            if wanted(name)
        }
        if tensors:
            self.load(tensors)
        return tensors


class Saver:
    """Writes the checkpoints of a run; all its processes call each method, with alike arguments.

    A checkpoint is first written aside. `commit` gives it its name and drops all but the newest
    few; until then, whatever happens, the checkpoints before it are what counts.

    Args:
        folder: of the run's checkpoints, which all processes reach.
        ranks: the processes.
        background: whether a copy is written while training goes on.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, background: bool = False) -> None:
        self._folder = folder
        self._ranks = ranks
        self._background = background
        self._pending: _Pending | None = None

    @property
    def ready(self) -> bool:
        """Whether this process has written its part of one that is not committed yet."""
        return self._pending is not None and not self._pending.thread.is_alive()

    def save(self, name: str, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Writes a checkpoint; one in the background is committed by a later call.

        Args:
            name: begins with "step-", and sorts behind those of earlier checkpoints.
            tensors: sharded ones, of which each process writes its part, and those all have alike.
            state: plain data.

        Raises:
            UserError: it cannot be written; earlier checkpoints are as they were.
        """
        self.commit()
        path, ranks = self._folder / name, self._ranks
        if ranks.agree(path.exists()):
            return
        with ranks.together():
            made = str(temporary_folder(path)) if ranks.first else ""
        temporary = Path(ranks.agree(made))
        writer = _Collector(str(temporary), copies=self._background)
        save_parts(dict(tensors), storage_writer=writer)
        self._pending = _Pending(path, temporary, dict(state), writer)
        if self._background:
            self._pending.thread.start()
        else:
            self._pending.write()
            self.commit()

    def commit(self) -> None:
        """Waits for a checkpoint that is being written, and gives it its name.

        Raises:
            UserError: as for `save`.
        """
        pending, ranks, self._pending = self._pending, self._ranks, None
        if pending is None:
            return
        try:
            with ranks.together():
                pending.join()
            hashes = {n: h for part in ranks.gather(pending.hashes) for n, h in part.items()}
            with ranks.together():
                if ranks.first:
                    pending.publish(hashes)
        finally:
            if ranks.first:
                shutil.rmtree(pending.temporary, ignore_errors=True)


class _Pending:
    """A checkpoint that is being written."""

    def __init__(
        self, path: Path, temporary: Path, state: dict[str, Any], collected: "_Collector"
    ) -> None:
        self._path = path
        self.temporary = temporary
        self._state = state
        self._collected = collected
        self.hashes: dict[str, str] = {}
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self.write, name="checkpoint", daemon=True)

    def write(self) -> None:
        """Writes this process's part, flushed to disk."""
        try:
            for name, (tensors, metadata) in self._collected.files.items():
                save_file(tensors, self.temporary / name, metadata)
                sync(self.temporary / name)
                self.hashes[name] = sha256(self.temporary / name)
        except (OSError, SafetensorError) as error:
            self._error = error

    def join(self) -> None:
        """Waits until this process has written.

        Raises:
            UserError: it could not.
        """
        if self.thread.ident is not None:
            self.thread.join()
        if self._error is not None:
            raise UserError(
                f"{self._path}: cannot be written ({self._error}); the checkpoints before it are "
                "whole"
            ) from self._error

    def publish(self, hashes: Mapping[str, str]) -> None:
        """Gives the checkpoint its name, and drops old ones.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            text = json.dumps({**self._state, "sha256": hashes})
            (self.temporary / STATE).write_text(text, encoding="utf-8")
            sync(self.temporary / STATE)
            sync(self.temporary)
            self.temporary.rename(self._path)
            sync(self._path.parent)
            for old in _steps(self._path.parent)[:-KEPT]:
                shutil.rmtree(old)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error}); the checkpoints before it are whole"
            ) from error


def load_newest(folder: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Returns the newest checkpoint of a run that is whole, the same in all processes.

    What a killed process left unfinished is removed, and so are newer ones that are damaged: they
    would stand in the way of whole ones.

    Raises:
        UserError: there is none.
    """
    ranks = ranks or Ranks()
    if ranks.first:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
    damaged: list[Path] = []
    for path in reversed(ranks.agree(_steps(folder))):
        state, whole = {}, False
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            hashes = sorted(state.pop("sha256").items())
            # Each process looks at its share of the files.
            own = hashes[ranks.rank :: ranks.size]
            whole = bool(hashes) and all(sha256(path / name) == found for name, found in own)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            pass
        if all(ranks.gather(whole)):
            if ranks.first:
                for newer in damaged:
                    shutil.rmtree(newer, ignore_errors=True)
            return Checkpoint(path=path, state=state)
        damaged.append(path)
    raise UserError(f"{folder}: holds no whole checkpoint; start the run anew")


class _Collector(HuggingFaceStorageWriter):
    """Learns which tensors are this process's to write; torch's own writer would copy them all.

    Attributes:
        files: by name, tensors and metadata as `save_file` takes them.

    Args:
        path: folder to write to.
        copies: whether the tensors are copies, which training does not change.
    """

    def __init__(self, path: str, *, copies: bool) -> None:
        super().__init__(path, save_distributed=True)
        self._copies = copies
        self.files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Collects the tensors of one safetensors file."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, Sequence[int]]] = {}
        results = []
        name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001{_SUFFIX}"
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{item.index.fqn} is no tensor")
            tensor = tensor.detach()
            if self._copies and tensor.device.type == "cpu":
                tensor = tensor.clone()
            tensors[item.index.fqn] = tensor.cpu().contiguous()
            offset = item.tensor_data.chunk.offsets  # type: ignore[union-attr]
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(offset)}
            info = _StorageInfo(relative_path=name, offset=0, length=tensor.nbytes)
            results.append(
                WriteResult(index=item.index, size_in_bytes=tensor.nbytes, storage_data=info)
            )
        if tensors:
            self.files[name] = (tensors, {CUSTOM_METADATA_KEY: json.dumps(offsets)})
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
