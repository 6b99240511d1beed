"""What cutting a trained model's outputs to a rank would cost in logloss, measured on data."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from recsys_compress.compress.spectrum import Spectrum


class Damage:
    """The rise of the mean logloss if outputs y were cut to rank k, for every k at once.

    To the second order, with the Gauss-Newton matrix for the Hessian and without the first order,
    which vanishes for a trained model, it is E[p (1 - p) (g . d_k)^2] / 2 for the predicted
    probability p, the logit's gradient g by y and the part d_k = (I - U_k U_k^T)(y - mu) that is
    cut off.

    Args:
        spectrum: mu and U.
    """

    def __init__(self, spectrum: Spectrum) -> None:
        self._spectrum = spectrum
        self._total = torch.zeros(len(spectrum.mean) + 1, dtype=torch.float64)
        self._rows = 0

    def add(
        self, outputs: Tensor, gradients: Tensor, logits: Tensor, counts: Tensor | None = None
    ) -> None:
        """Counts a batch in.

        Args:
            outputs: (B, ..., D) y.
            gradients: (B, ..., D) of each row's own logit.
            logits: (B,) of the predictions.
            counts: (B,) times that an output has the mean, for sums over bags; None for once.
        """
        mean = self._spectrum.mean
        y = outputs.detach().double().cpu()
        centred = y - (mean if counts is None else counts.cpu().double().unsqueeze(1) * mean)
        basis = self._spectrum.eigenvectors
        parts = (gradients.detach().double().cpu() @ basis) * (centred @ basis)
        by_component = parts.flatten(1, -2).sum(dim=1) if parts.dim() > 2 else parts
        cut = by_component.flip(1).cumsum(1).flip(1)  # the change of the logit at rank 0, 1, ...
        p = torch.sigmoid(logits.detach().double().cpu())
        self._total[:-1] += (p * (1 - p)) @ cut.square() / 2
        self._rows += len(logits)

    def losses(self) -> Tensor:
        """Returns (D + 1,) the rise at rank 0, 1, ..., D; none at D."""
        return self._total / max(self._rows, 1)


def measure(
    model: nn.Module,
    embeddings: Any,
    layers: Mapping[str, nn.Module],
    spectra: Mapping[str, Spectrum],
    batches: Iterable[tuple[Tensor, KeyedJaggedTensor]],
) -> dict[str, Tensor]:
    """Returns what cutting each table and each layer alone would cost; see `Damage.losses`.

    Nothing is trained: the backward pass stops at the outputs.

    Args:
        model: (dense, sparse) -> (B,) logits, whose rows do not depend on each other (batch norm
            in evaluation mode).
        embeddings: the model's tables, like an `EmbeddingBagCollection`.
        layers: by name.
        spectra: of the outputs of tables and layers, by name; others are left out.
        batches: dense and sparse features of some of the training split.
    """
    found = {name: Damage(spectrum) for name, spectrum in spectra.items()}
    outputs: dict[str, Tensor] = {}
    pooled: list[KeyedTensor] = []
    hooks = [embeddings.register_forward_hook(lambda _m, _x, output: pooled.append(output))]
    hooks += [
        layer.register_forward_hook(functools.partial(_keep, outputs, name))
        for name, layer in layers.items()
    ]
    for dense, sparse in batches:
        pooled.clear()
        logits = model(dense, sparse)
        kept = [pooled[0].values(), *outputs.values()]
        vectors, *gradients = torch.autograd.grad(logits.sum(), kept)
        for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
            if name in found:
                found[name].add(output, gradient, logits)
        widths = pooled[0].length_per_key()
        by_key = dict(zip(pooled[0].keys(), torch.split(vectors, widths, dim=1), strict=True))
        for table in embeddings.embedding_bag_configs():
            for feature in table.feature_names if table.name in found else ():
                counts = _means(sparse[feature], table.pooling, weighted=embeddings.is_weighted())
                found[table.name].add(pooled[0][feature], by_key[feature], logits, counts)
    for hook in hooks:
        hook.remove()
    return {name: damage.losses() for name, damage in found.items()}


def _means(bags: JaggedTensor, pooling: PoolingType, *, weighted: bool) -> Tensor:
    """Returns (B,) how many times each bag's vector has the mean: as its ids' weights say."""
    lengths = bags.lengths().long()
    totals = lengths.double()
    if weighted:
        given = bags.weights().double()
        totals = torch.segment_reduce(given, "sum", lengths=lengths, initial=0)
    return totals / lengths.clamp(min=1) if pooling == PoolingType.MEAN else totals


def _keep(
    outputs: dict[str, Tensor], name: str, _layer: nn.Module, _inputs: object, output: Tensor
) -> None:
    outputs[name] = output
