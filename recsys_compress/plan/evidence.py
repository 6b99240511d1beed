"""Gathers what a plan is made from, by its grade."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from recsys_compress.config import Job
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.plan.curves import DataEvidence, Evidence, Scales
from recsys_compress.plan.labels import label_counts
from recsys_compress.plan.probes import probe
from recsys_compress.plan.quality import AucByLoss
from recsys_compress.plan.reference import read_reference
from recsys_compress.plan.request import Request
from recsys_compress.plan.trials import Measure, TakenOver, untracked_training


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a plan is made from.

    Attributes:
        evidence: of what candidates cost.
        quality: what a rise of the logloss does to the AUC; None for the grade "data".
        scales: corrections of the estimates.
        measure: tries a policy out on validation, as the plan is to begin; None for the grade
            "data".
    """

    evidence: Evidence
    quality: AucByLoss | None = None
    scales: Scales
    measure: Measure | None = None


def gather(
    job: Job, dataset: PreparedDataset, tables: Sequence[EmbeddingBagConfig], request: Request
) -> Gathered:
    """Returns the evidence of a grade.

    Args:
        job: that is planned.
        dataset: its data.
        tables: its logical tables.
        request: its reference is settled.

    Raises:
        UserError: the reference run cannot be read, or is of other tables.
    """
    if request.grade == "data" or request.reference is None:
        counts = label_counts(dataset, [table.name for table in tables])
        return Gathered(evidence=DataEvidence(counts), scales=Scales())
    found = read_reference(job, dataset, request.reference)
    if request.adopting:
        return Gathered(
            evidence=found.evidence,
            quality=found.quality,
            scales=Scales(),
            measure=TakenOver(found.built, found.dataset, found.evidence.curvature),
        )
    # From scratch a trial is a whole training, unless it is to be shorter: what takes long to learn
    # is behind at first.
    epochs = request.trial_epochs or job.train.epochs
    return Gathered(
        evidence=found.evidence,
        quality=found.quality,
        scales=probe(job, tables, found.evidence, request.methods, request.probe_epochs),
        measure=lambda policy: untracked_training(job, tables, policy, epochs),
    )
