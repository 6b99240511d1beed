"""What a checkpoint remembers besides tensors."""

import dataclasses
import uuid
from typing import Any

from recsys_compress.train.events import Metrics


@dataclasses.dataclass
class Progress:
    """A run's position and history.

    Attributes:
        run_id: 32 hexadecimal digits.
        dataset: checksum of its data.
        step: training steps done.
        rows: training rows seen.
        train_seconds: spent on them, evaluation left out.
        seconds: wall-clock time of the run, in all the processes that it has gone on in.
        cpu_seconds: likewise, of all threads.
        phase: number of the phase it is in.
        phase_step: step at which that phase began.
        lowering: the policy that is trained, as `Policy.describe` has it.
        streams: places of the data that batches are put together from; see `DataConfig`.
        reader: position of the training reader.
        search_reader: position of the validation reader of a phase that searches.
        best: validation figures of the best weights so far, with their "step".
        waited: evaluations since then.
        history: one entry per evaluation.
    """

    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    dataset: str = ""
    step: int = 0
    rows: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    phase: int = 0
    phase_step: int = 0
    lowering: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    streams: int = 1
    reader: dict[str, int] = dataclasses.field(default_factory=dict)
    search_reader: dict[str, int] = dataclasses.field(default_factory=dict)
    best: Metrics | None = None
    waited: int = 0
    history: list[Metrics] = dataclasses.field(default_factory=list)
