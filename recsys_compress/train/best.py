"""The weights that were best on validation, as a run's folder keeps them."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recsys_compress.errors import UserError
from recsys_compress.files import atomic_file
from recsys_compress.ranks import Ranks
from recsys_compress.train.build import Built
from recsys_compress.train.folder import JOB, MODEL
from recsys_compress.train.shard import write


def keep_best(built: Built, folder: Path, ranks: Ranks, step: int) -> None:
    """Writes a model's weights, in place of those that were best before.

    Args:
        built: the model.
        folder: the run's own folder.
        ranks: the processes, all of which must ask.
        step: after which it has these weights.

    Raises:
        UserError: they cannot be written; those before are as they were.
    """
    weights = built.weights()
    with ranks.together():
        if ranks.first:
            whole = {name: weight.contiguous() for name, weight in weights.items()}
            with atomic_file(folder / MODEL) as path:
                save_file(whole, path, {"step": str(step)})


def load_best(built: Built, folder: Path) -> None:
    """Gives a model the weights that its run kept, to each process its part of them.

    Raises:
        UserError: the file cannot be read, or is of another model.
    """
    path, state = folder / MODEL, built.state()
    try:
        with safe_open(path, "pt") as kept:
            sizes = {name: tuple(kept.get_slice(name).get_shape()) for name in kept.keys()}  # noqa: SIM118
            if sizes != {name: tuple(weight.size()) for name, weight in state.items()}:
                raise UserError(
                    f"{path}: does not fit {folder / JOB} and its data; train the model anew"
                )
            # A number alone has no slices.
            write(
                state,
                {n: kept.get_slice(n) if size else kept.get_tensor(n) for n, size in sizes.items()},
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); train the model anew") from error
