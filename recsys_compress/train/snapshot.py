"""The tensors of one moment of a training, from which it goes on as if it had not stopped."""

from collections.abc import Sequence
from typing import Any

import torch

from recsys_compress.compress.hashing import salt
from recsys_compress.compress.hook import Hook
from recsys_compress.compress.tensors import below
from recsys_compress.ranks import Ranks
from recsys_compress.train.build import Built
from recsys_compress.train.checkpoint import Checkpoint


def snapshot(built: Built, hooks: Sequence[Hook], ranks: Ranks) -> dict[str, Any]:
    """Returns a model's weights, its optimizers' and hooks' state and the random numbers' by name.

    Args:
        built: the model.
        hooks: of its methods.
        ranks: the processes, all of which must ask.
    """
    tensors = _sharded(built)
    tensors |= {f"optim/{name}": value for name, value in built.optimizers.dense_tensors().items()}
    for number, hook in enumerate(hooks):
        tensors |= {f"hook/{number}/{name}": value for name, value in hook.tensors().items()}
    # Each process draws its own random numbers.
    tensors["rng"] = ranks.concat(torch.get_rng_state().unsqueeze(0))
    if built.device.type == "cuda":
        tensors["rng.cuda"] = ranks.concat(torch.cuda.get_rng_state().unsqueeze(0))
    return tensors


def restore(
    checkpoint: Checkpoint, built: Built, hooks: Sequence[Hook], ranks: Ranks, step: int
) -> None:
    """Loads what `snapshot` returned, perhaps of another number of processes.

    Args:
        checkpoint: holds it.
        built: the model.
        hooks: of its methods.
        ranks: the processes, all of which must ask.
        step: of the checkpoint.
    """
    with ranks.together():
        checkpoint.load(_sharded(built))
        rest = checkpoint.read(lambda name: name.startswith(("optim/dense/", "hook/", "rng")))
    built.optimizers.load_dense(below("optim/", rest))
    for number, hook in enumerate(hooks):
        hook.load_tensors(below(f"hook/{number}/", rest))
    if ranks.rank < len(rest["rng"]):
        # A copy: torch crashes on a part of a tensor.
        torch.set_rng_state(rest["rng"][ranks.rank].clone())
        if "rng.cuda" in rest and built.device.type == "cuda":
            torch.cuda.set_rng_state(rest["rng.cuda"][ranks.rank].clone())
    else:  # a process more than there were
        torch.manual_seed(salt("more", ranks.rank, step))


def _sharded(built: Built) -> dict[str, Any]:
    """Returns the tensors that a checkpoint is loaded into in place."""
    tensors = {f"model/{name}": value for name, value in built.state().items()}
    fused = built.optimizers.fused_tensors()
    return tensors | {f"optim/{name}": value for name, value in fused.items()}
