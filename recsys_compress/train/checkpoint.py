"""Checkpoints: tensors as safetensors, the rest as JSON, whole or absent.

In torch's distributed checkpoints each process writes its part, and more or fewer processes can
read it. Nothing in ours is pickled.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
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


def save(
    folder: Path, name: str, tensors: Mapping[str, Any], state: Mapping[str, Any], ranks: Ranks
) -> Path:
    """Writes a checkpoint as `folder/name` and drops all but the newest few; all processes call it.

    Args:
        folder: of the run's checkpoints, which all processes reach.
        name: begins with "step-", and sorts behind those of earlier checkpoints.
        tensors: sharded ones, of which each process writes its part, and those all have alike.
        state: plain data.
        ranks: the processes.

    Raises:
        UserError: the folder cannot be written; earlier checkpoints are as they were.
    """
    path = folder / name
    if ranks.agree(path.exists()):
        return path
    with ranks.together():
        made = str(temporary_folder(path)) if ranks.first else ""
    temporary = Path(ranks.agree(made))
    try:
        save_parts(dict(tensors), storage_writer=_Writer(str(temporary), save_distributed=True))
        with ranks.together():
            own = temporary.glob(f"shard-{ranks.rank + 1:05d}-*{_SUFFIX}")
            hashes = {file.name: sha256(file) for file in own}
        every = {n: h for part in ranks.gather(hashes) for n, h in part.items()}
        with ranks.together():
            if ranks.first:
                text = json.dumps({**state, "sha256": every})
                (temporary / STATE).write_text(text, encoding="utf-8")
                sync(temporary / STATE)
                sync(temporary)
                temporary.rename(path)
                sync(folder)
                for old in _steps(folder)[:-KEPT]:
                    shutil.rmtree(old)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise UserError(
            f"{path}: process {rank} cannot write it ({cause}); the checkpoints before it are whole"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the checkpoints before it are whole"
        ) from error
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def load_newest(folder: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Returns the newest checkpoint of a run that is whole, the same in all processes.

    What a killed process left unfinished is removed.

    Raises:
        UserError: there is none.
    """
    ranks = ranks or Ranks()
    if ranks.first:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
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
            return Checkpoint(path=path, state=state)
    raise UserError(f"{folder}: holds no whole checkpoint; start the run anew")


class _Writer(HuggingFaceStorageWriter):
    """Writes a process's tensors straight from where they lie; torch's own copies all of them."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes one safetensors file, flushed to disk."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, Sequence[int]]] = {}
        results = []
        number = plan.storage_data["shard_index"]
        name = f"shard-{number:05d}-model-00001-of-00001{_SUFFIX}"
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{item.index.fqn} is no tensor")
            tensors[item.index.fqn] = tensor.detach().cpu().contiguous()
            offset = item.tensor_data.chunk.offsets  # type: ignore[union-attr]
            offsets[item.index.fqn] = {SAVED_OFFSETS_KEY: list(offset)}
            info = _StorageInfo(relative_path=name, offset=0, length=tensor.nbytes)
            results.append(
                WriteResult(index=item.index, size_in_bytes=tensor.nbytes, storage_data=info)
            )
        path = Path(self.path) / name
        save_file(tensors, path, {CUSTOM_METADATA_KEY: json.dumps(offsets)})
        sync(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
