"""Checkpoints: tensors as safetensors, the rest as JSON, whole or absent."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys_compress.errors import UserError
from recsys_compress.files import atomic_folder, sha256

TENSORS = "tensors.safetensors"
STATE = "state.json"
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A moment of training.

    Attributes:
        tensors: by flat name.
        state: plain data.
    """

    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, name: str, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint as `folder/name` and drops all but the newest few.

    Args:
        folder: of the run's checkpoints.
        name: begins with "step-", and sorts behind those of earlier checkpoints.
        checkpoint: what to write.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / name
    if path.exists():
        return path
    with atomic_folder(path) as temporary:
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, temporary / TENSORS)
        state = {**checkpoint.state, "sha256": sha256(temporary / TENSORS)}
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    for old in _steps(folder)[:-KEPT]:
        shutil.rmtree(old)
    return path


def load_newest(folder: Path) -> Checkpoint:
    """Reads the newest checkpoint of a run that is whole.

    Raises:
        UserError: there is none.
    """
    for path in reversed(_steps(folder)):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state.pop("sha256") == sha256(path / TENSORS):
                return Checkpoint(tensors=load_file(path / TENSORS), state=state)
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    raise UserError(f"{folder}: holds no whole checkpoint; start the run anew")


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
