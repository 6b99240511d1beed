"""What is asked of a plan."""

from dataclasses import dataclass
from pathlib import Path

from recsys_compress.byte_sizes import budget_bytes, parse_bytes
from recsys_compress.errors import UserError
from recsys_compress.plan.candidates import Purpose
from recsys_compress.plan.curves import Grade
from recsys_compress.plan.menu import METHODS


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a plan.

    Attributes:
        purpose: which bytes the budget is for.
        budget: bytes as in a job; a share is of the full tables' bytes of the same kind.
        max_auc_loss: the AUC on validation that the smallest plan may lose, as measured, in the
            place of a budget.
        grade: of the evidence.
        reference: folder of a finished run of full tables, for the grades but "data"; None to
            train a short one.
        methods: that tables may have which no rule of the job names.
        probe_epochs: passes over the training split for each probe of the grade "probes", and for
            the short reference run.
        trial_epochs: passes for each way to store all tables that is tried out from scratch; None
            for the job's.
        world_size: processes that the fused tables are divided among; None to plan for bytes alone.
        hbm: memory of each process's GPU; None for what the job says.
    """

    purpose: Purpose = "training"
    budget: str | int | None = None
    max_auc_loss: float | None = None
    grade: Grade = "data"
    reference: Path | None = None
    methods: tuple[str, ...] = METHODS
    probe_epochs: int = 1
    trial_epochs: int | None = None
    world_size: int | None = None
    hbm: str | None = None

    @property
    def adopting(self) -> bool:
        """Whether the plan is to be trained from the reference run's tables on.

        It is what the grade "reference" predicts; probes are trained from scratch.
        """
        return self.grade == "reference"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.max_auc_loss is None):
            raise UserError("plan: give either --budget or --max-auc-loss")
        if self.max_auc_loss is not None and self.max_auc_loss <= 0:
            raise UserError(f"--max-auc-loss {self.max_auc_loss}: must be positive, like 0.001")
        if self.max_auc_loss is not None and self.grade == "data":
            raise UserError(
                "--max-auc-loss: grade 'data' knows no AUC; use --grade reference, or name a "
                "finished run with --reference"
            )
        # Here, not after hours of gathering evidence.
        if isinstance(self.budget, str):
            budget_bytes(self.budget, 10**12)
        if self.world_size is not None and self.world_size < 1:
            raise UserError(f"--world-size {self.world_size}: must be positive, like 8")
        if self.hbm is not None:
            parse_bytes(self.hbm)
        if self.grade == "data" and self.reference is not None:
            raise UserError("--reference: grade 'data' looks at no run; use --grade reference")
        if self.grade == "data" and (self.trial_epochs is not None or self.probe_epochs != 1):
            raise UserError("--trial-epochs, --probe-epochs: grade 'data' trains nothing")
        if not self.methods:
            raise UserError("--methods: names none; name some")
        if self.hbm is not None and self.world_size is None:
            raise UserError("--hbm: is memory of each process; give their number, --world-size")
