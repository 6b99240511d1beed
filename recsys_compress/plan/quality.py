"""What a rise of the logloss does to the AUC of a trained model."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.data.reader import Reader
from recsys_compress.train.build import Built
from recsys_compress.train.evaluate import evaluate
from recsys_compress.train.metrics import BinaryMetrics

_SCALES = np.concatenate([[0.0], np.geomspace(0.01, 6.0, 40)])  # of noise, in logits


@dataclass(frozen=True, kw_only=True)
class AucByLoss:
    """AUC and logloss of a model's predictions under more and more noise.

    A compressed table changes logits by something like noise: its logloss tells how much, and the
    noise of that logloss how much AUC goes.

    Attributes:
        rises: (S,) logloss above the model's own, rising from 0.
        aucs: (S,) falling.
        logloss: of the model on the validation split.
    """

    rises: npt.NDArray[np.float64]
    aucs: npt.NDArray[np.float64]
    logloss: float

    @staticmethod
    def of(built: Built, dataset: PreparedDataset) -> "AucByLoss":
        """Measures it on the validation split."""
        reader = Reader(dataset, "valid", batch_size=built.job.train.eval_batch_size)
        given, truth, weights = evaluate(built.model, reader, built.device).columns()
        noise = torch.randn(len(given), generator=torch.Generator().manual_seed(0))
        found = []
        for scale in _SCALES.tolist():
            metrics = BinaryMetrics()
            metrics.update(given + scale * noise, truth, weights)
            found.append(metrics.compute())
        losses = np.maximum.accumulate([figures["logloss"] for figures in found])
        # A little noise may not raise the logloss of a model of too bold logits; the AUC at a rise
        # of 0 is then the model's own, not that under the noise.
        rises, first = np.unique(losses - losses[0], return_index=True)
        return AucByLoss(
            rises=rises,
            aucs=np.minimum.accumulate([figures["auc"] for figures in found])[first],
            logloss=float(losses[0]),
        )

    def auc(self, rise: float) -> float:
        """Returns the AUC at a rise of the logloss."""
        return float(np.interp(rise, self.rises, self.aucs))

    def rise(self, lost_auc: float) -> float:
        """Returns the rise of the logloss at which so much AUC is lost."""
        return float(np.interp(lost_auc, self.aucs[0] - self.aucs, self.rises))
