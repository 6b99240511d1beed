"""Ways to store all tables, tried out on the validation split before one of them is planned."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.compress import Policy, StoragePlan, quantize
from recsys_compress.compress.curvature import Curvature
from recsys_compress.compress.planned import PlanFile
from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.data.split import Split
from recsys_compress.plan.candidates import Sizes
from recsys_compress.plan.menu import Dish
from recsys_compress.plan.ranks import FullestRank
from recsys_compress.track.progress import ProgressListener
from recsys_compress.train.build import Built, build
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.events import Metrics
from recsys_compress.train.handover import curvatures, hand_over
from recsys_compress.train.trainer import train

# Returns the validation figures of a policy.
Measure = Callable[[Policy], Metrics]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to store all tables.

    Attributes:
        name: what it is called in reports.
        dishes: by the tables that are stored together, what they become.
        policy: of them all.
        sizes: exact bytes.
        fullest: the process that holds most; None where their number was not given.
    """

    name: str
    dishes: Mapping[tuple[str, ...], Dish]
    policy: Policy
    sizes: Sizes
    fullest: FullestRank | None

    @property
    def loss(self) -> float:
        """The predicted rise of the logloss."""
        return sum(dish.estimate.loss for dish in self.dishes.values())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A way with its figures on validation."""

    way: Way
    valid: Metrics


class TakenOver:
    """A run's model, whose tables others take over; make and use it inside a process group.

    Args:
        built: the model.
        dataset: what it was trained on.
        curvature: by table; None to measure it where a method asks for it.
    """

    def __init__(
        self,
        built: Built,
        dataset: PreparedDataset,
        curvature: Callable[[str], Curvature] | None = None,
    ) -> None:
        self._before, self._dataset = built, dataset
        self._curvature = curvature or curvatures(built, dataset)

    def __call__(self, policy: Policy, split: Split = "valid") -> Metrics:
        """Returns figures of the model with its tables under a policy, as they are served.

        Raises:
            UserError: a method cannot take over what another has trained.
        """
        before = self._before
        tables = before.embeddings.embedding_bag_configs()
        start = hand_over(before, self._dataset, tables, policy, curvature=self._curvature)
        built = build(before.job, self._dataset.schema, start.policy)
        start.write(built)
        served = StoragePlan.planned(built.embeddings)
        built.model.module.embeddings = quantize(built.embeddings, served, built.table_weights())
        batches = Reader(self._dataset, split, batch_size=before.job.train.eval_batch_size)
        return evaluate(built.model.module, batches, built.device).compute()


def untracked_training(
    job: Job, tables: Sequence[EmbeddingBagConfig], policy: Policy, epochs: int
) -> Metrics:
    """Returns the validation figures of a training that leaves no folder and is not tracked.

    Args:
        job: whose tables are to be stored otherwise.
        tables: its logical tables.
        policy: of them.
        epochs: passes over the training split.

    Raises:
        KeyboardInterrupt: the training was asked to stop.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        PlanFile.of(policy, tables, job.embedding.optimizer).write(path)
        embedding = dataclasses.replace(
            job.embedding, method="full", budget=None, rules=(), plan=str(path)
        )
        settings = dataclasses.replace(job.train, epochs=epochs, output=str(Path(folder) / "runs"))
        short = dataclasses.replace(job, embedding=embedding, train=settings)
        result = train(short, listeners=[ProgressListener()])
    if result.interrupted:
        raise KeyboardInterrupt  # there is nothing to go on with
    return result.valid
