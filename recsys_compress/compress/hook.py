"""What a method does beside the look-ups while its tables train."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_compress.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class LiveTable:
    """A physical table while it trains: views of the tensors in the kernel and the optimizer.

    Where it is sharded, this process holds some of its rows.

    Attributes:
        weight: (rows here, stored D), padding included.
        state: by name, the optimizer's tensors that have a value or a row for each row: (rows,) or
            (rows, stored D). Empty before the first step of an optimizer that makes them then.
        bounds: first and last + 1 of the rows of each process; None where each holds all of them.
    """

    weight: Tensor
    state: Mapping[str, Tensor]
    bounds: Sequence[tuple[int, int]] | None = None

    @property
    def first(self) -> int:
        """The first row that is here."""
        return self.bounds[Ranks.current().rank][0] if self.bounds else 0


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """What a hook may ask in a phase that searches: losses in which no table can move.

    Attributes:
        train: features of the training batch that has just been learned from.
        valid: features of a batch of the validation split.
        train_loss: loss of the training batch; its graph reaches all parameters but the tables.
        valid_loss: loss of the validation batch, likewise.
    """

    train: KeyedJaggedTensor
    valid: KeyedJaggedTensor
    train_loss: Callable[[], Tensor]
    valid_loss: Callable[[], Tensor]


class Hook:
    """Called by the trainer at fixed points; the default does nothing.

    What must survive a killed run is in buffers of the lowering's modules or in `tensors`. Where
    several processes train, each has its share of every batch and calls each hook at the same
    points; gradients are those of its own share's loss, whose mean over the processes is the loss.

    Attributes:
        parameters: parameters of the lowering's `combine` that the hook trains itself; no
            optimizer of the trainer has them.
    """

    parameters: Sequence[nn.Parameter] = ()

    def bind(self, table: Callable[[str], LiveTable]) -> None:
        """Is given access to the lowering's physical tables, by name.

        Call `table` anew each time: an optimizer may make its tensors late, or replace them.
        """

    def looked_up(self, features: KeyedJaggedTensor, vectors: KeyedTensor) -> None:
        """After each forward pass of training.

        Args:
            features: all features of the batch.
            vectors: the collection's output; a hook may register hooks on its `values()`.
        """

    def on_step(self, progress: float) -> None:
        """After each training step, when tables and parameters have been updated.

        Args:
            progress: share of the phase's steps that are done, in (0, 1].
        """

    def search(self, step: SearchStep) -> None:
        """After each training step of a phase that searches."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns the state that a checkpoint keeps, the same in all processes."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
